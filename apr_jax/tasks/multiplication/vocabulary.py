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
from apr_jax.tasks.word_level import word_level

TOKENIZER = pathlib.Path(__file__).with_name("tokenizer.json")
CONTROL = ("<pad>", "<s>", "</s>", "<unk>")


def tokenizer_json() -> dict[str, Any]:
    """Return tokenizer.json: marks, symbols, factors' names, digits, and what names its place."""
    marks = (CALL_BEGIN, CALL_END, JOIN_BEGIN, JOIN_END)
    placed = [place + sign + digit for sign, place, digit in itertools.product(("", "^"), PLACES, DIGITS)]
    multipliers = [f"{place}*{digit}" for place, digit in itertools.product(PLACES[:FACTOR_DIGITS], DIGITS)]
    words = [*CONTROL, *marks, *"\n=*:", *NAMES, *DIGITS, *placed, *multipliers]
    split = "|".join([*map(re.escape, marks), f"[{PLACES[0]}-{PLACES[-1]}][*^]?[{DIGITS}]"])
    return word_level(words, len(CONTROL), f"{split}|[\\s\\S]")


if __name__ == "__main__":
    TOKENIZER.write_text(json.dumps(tokenizer_json()) + "\n")
