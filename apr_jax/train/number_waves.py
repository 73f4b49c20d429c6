"""Number embeddings that start as waves: cosines and sines of the number and of its logarithm.

Embeddings that start at random say nothing about how numbers are related, so each sum has to be learnt on its own. In
waves of the number, the wave of a sum is a product of its terms' waves. One gated layer can learn that product for all
numbers at once. Waves of the logarithm do the same for products and quotients. A token that names a digit's place, as
`b7`, has waves of the place beside those of the digit, so what is learnt of a place holds for all its digits. Zhou et
al. 2025 (arXiv 2502.09741) give numbers such embeddings for good; here they are a start, and are trained like all
others.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from apr_jax.config import ConfigError
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.model.params import Params

_PLACED = re.compile("([a-z])[*^]?([0-9]{1,3})")

PERIODS = (2, 3, 5, 7, 10, 20, 25, 50, 100, 200, 512)  # of the number
LOG_PERIODS = tuple(12 / 2**octave for octave in range(9))  # of its natural logarithm


def with_number_waves(params: Params, tokenizer: Tokenizer, amplitude: float) -> Params:
    """Give the number tokens of fresh parameters waves of that amplitude, in the embedding and in an untied head.

    The embedding has them in its first columns. An untied head reads them from the last columns: if it read them from
    the same, each number would begin as its own most likely successor, as it does with tied embeddings. Waves of places
    stand in the columns next to those.

    Raises ConfigError if the embedding has fewer columns than there are waves.
    """
    changed: Any = params
    numbers, placed = number_tokens(tokenizer), placed_tokens(tokenizer)
    width = 2 * (len(PERIODS) + len(LOG_PERIODS))
    embedding_VD = np.array(changed["embedding"][...])
    check_width(embedding_VD.shape[1])
    head_DV = np.array(changed["head"][...]) if "head" in changed else None
    waved = [(0, [*numbers.values()], [*numbers])]
    if placed and embedding_VD.shape[1] >= 2 * width:
        waved += [(0, [*placed], [number for _, number in placed.values()])]
        waved += [(width, [*placed], [place for place, _ in placed.values()])]
    for column, rows, values in waved:
        waves_NW = amplitude * number_waves(np.asarray(values))
        embedding_VD[rows, column : column + width] = waves_NW
        if head_DV is not None:
            end = len(head_DV) - column
            head_DV[end - width : end, rows] = waves_NW.T
    changed["embedding"] = changed["embedding"].replace(jnp.asarray(embedding_VD))
    if head_DV is not None:
        changed["head"] = changed["head"].replace(jnp.asarray(head_DV))
    return params


def check_width(embed_dim: int) -> None:
    """Raise ConfigError if an embedding has fewer columns than there are waves."""
    width = 2 * (len(PERIODS) + len(LOG_PERIODS))
    if width > embed_dim:
        raise ConfigError(f"model.embed_dim={embed_dim} holds no {width} waves: set sft.number_waves=0")


def number_tokens(tokenizer: Tokenizer) -> Mapping[int, int]:
    """Find the numbers that are one token. Returns their ids by number."""
    texts = tokenizer.token_texts(range(tokenizer.vocab_size))
    spelt = [text for text in texts if text.isascii() and text.isdecimal() and len(text) < 100]
    found = {int(text): tokenizer.encode(text) for text in spelt if text == str(int(text))}
    return {number: ids[0] for number, ids in sorted(found.items()) if len(ids) == 1}


def placed_tokens(tokenizer: Tokenizer) -> Mapping[int, tuple[int, int]]:
    """Find the tokens that are a letter and a number, maybe with * or ^ between: the letter's and the number, by id."""
    texts = enumerate(tokenizer.token_texts(range(tokenizer.vocab_size)))
    found = ((index, _PLACED.fullmatch(text)) for index, text in texts)
    return {index: (ord(placed[1]) - ord("a"), int(placed[2])) for index, placed in found if placed}


def number_waves(numbers: NDArray[np.int64]) -> NDArray[np.float32]:
    """Compute cosine and sine of each number for each period, [numbers, waves]. 0 has the logarithm of 1/2."""
    logarithms = np.log(np.maximum(numbers, 0.5))
    turns = [numbers / period for period in PERIODS] + [logarithms / period for period in LOG_PERIODS]
    angles = 2 * np.pi * np.stack(turns, axis=1)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
