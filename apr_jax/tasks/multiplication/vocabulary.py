"""The vocabulary of products, one token for each thing that stands in them, as a Hugging Face tokenizer.json.

python -m apr_jax.tasks.multiplication.vocabulary     writes tokenizer.json beside this file
"""

import itertools
import json
import pathlib
import re
from typing import Any

from apr_jax.tasks.dialect import CALL_BEGIN, CALL_END, JOIN_BEGIN, JOIN_END
from apr_jax.tasks.multiplication.numerals import DIGITS, FACTOR_DIGITS, NAMES, PLACES

TOKENIZER = pathlib.Path(__file__).with_name("tokenizer.json")
CONTROL = ("<pad>", "<s>", "</s>", "<unk>")


def tokenizer_json() -> dict[str, Any]:
    """Return tokenizer.json: marks, symbols, factors' names, digits, and what names its place."""
    marks = (CALL_BEGIN, CALL_END, JOIN_BEGIN, JOIN_END)
    placed = [place + sign + digit for sign, place, digit in itertools.product(("", "^"), PLACES, DIGITS)]
    multipliers = [f"{place}*{digit}" for place, digit in itertools.product(PLACES[:FACTOR_DIGITS], DIGITS)]
    words = [*CONTROL, *marks, *"\n=*:", *NAMES, *DIGITS, *placed, *multipliers]
    split = "|".join([*map(re.escape, marks), f"[{PLACES[0]}-{PLACES[-1]}][*^]?[{DIGITS}]"])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for index, name in enumerate(CONTROL)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": f"{split}|[\\s\\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: index for index, word in enumerate(words)},
            "unk_token": "<unk>",
        },
    }


if __name__ == "__main__":
    TOKENIZER.write_text(json.dumps(tokenizer_json()) + "\n")
