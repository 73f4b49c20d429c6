"""The policy that comes with the package: a Hugging Face folder with a card, as launch/export.py writes it."""

import pathlib

SHIPPED = pathlib.Path(__file__).parent / "laptop"
