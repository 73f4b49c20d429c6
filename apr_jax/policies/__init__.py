"""Policies that come with the package: Hugging Face folders with cards, as launch/export.py writes them.

laptop          three numbers of 1..20 to a target, after GRPO
multiplication  products of 5 to 8 integers, after SFT
"""

import pathlib

SHIPPED = pathlib.Path(__file__).parent / "laptop"  # where no policy is named
