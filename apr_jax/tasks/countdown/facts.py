"""Bare arithmetic: operations as they are written in a trace, with no target that gives the result away.

Comparisons of a result with the target come, too: in a search hardly any is true.
"""

import functools
import random

from apr_jax.config import ConfigError
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.config import CountdownConfig

_LARGEST_BOUND = 100_000


def draw_fact(rng: random.Random, section: CountdownConfig) -> tuple[str, str]:
    """Draw a random operation, or the comparison of a result with a target, in half of which the two are equal.

    Sums and differences, of which there are more, come twice as often as products and quotients. Their numbers are like
    those of a problem or any up to the bound, as a search meets them at its end, and often close to each other. All
    products are equally likely, and so are all quotients.

    With `task.attempts` there are sums and products above the bound, which end before the `=`, and divisions in place
    of quotients. Half of the products are within the bound, and in half of the divisions one number divides the other.

    Return what is given of the text, up to `=` (with `task.attempts` to the second number) or to the target, and the
    rest. No result is above `largest_result(section)`. Raises ConfigError as `largest_result`.
    """
    bound = largest_result(section)
    operator = rng.choice("++--**////?" if section.attempts else "++--*/?")
    if operator == "?":
        target = rng.randint(section.min_target, section.max_target)
        result = target if rng.random() < 0.5 else rng.randint(0, bound)
        outcome = trace.outcome_line(target, result)
        given = f"{result},{target}"
        return given, outcome[len(given) : -1]
    if section.attempts:
        return _attempt(rng, section, operator, bound)
    if operator in "*/":
        left, right = rng.choice(_factors(bound))
        if operator == "/":
            return f"{left * right}/{left}=", str(right)
        return f"{left}*{right}=", str(left * right)
    while True:
        left, right = _two_numbers(rng, section, bound)
        if operator == "-":
            return f"{max(left, right)}-{min(left, right)}=", str(abs(left - right))
        if left + right <= bound:
            return f"{left}+{right}=", str(left + right)


def _two_numbers(rng: random.Random, section: CountdownConfig, bound: int) -> tuple[int, int]:
    """Draw two numbers, each like those of a problem or any up to the bound; a quarter of them differ by at most 3."""
    left, right = _number(rng, section, bound), _number(rng, section, bound)
    if rng.random() < 1 / 4:
        right = min(max(left + rng.randint(-3, 3), 0), bound)
    return left, right


def _number(rng: random.Random, section: CountdownConfig, bound: int) -> int:
    low, high = (section.min_number, section.max_number) if rng.random() < 1 / 2 else (0, bound)
    return rng.randint(low, high)


def _attempt(rng: random.Random, section: CountdownConfig, operator: str, bound: int) -> tuple[str, str]:
    """Draw two numbers. Return their operation up to the second, and the rest: `=` with the result, or a product."""
    if operator in "*/" and rng.random() < 0.5:
        left, right = rng.choice(_factors(bound))
        left, right = (left * right, left) if operator == "/" else (left, right)
    else:
        left, right = _two_numbers(rng, section, bound)
        left, right = (max(left, right), min(left, right)) if operator in "-/" else (left, right)
    asked = f"{left}{operator}{right}"
    if operator == "/":
        return asked, trace.division_line(left, right, bound).partition(asked)[2][:-1]
    result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return asked, f"={result}" if result <= bound else ""


def largest_result(task: CountdownConfig) -> int:
    """Return the bound on results: that of the searches or, if they have none, the largest product of two numbers.

    Raises ConfigError for a bound whose products are too many to list.
    """
    bound = task.max_result or task.max_number**2
    if bound > _LARGEST_BOUND:
        raise ConfigError(
            f"facts with results up to {bound} are too many: set task.max_result to at most {_LARGEST_BOUND}"
        )
    return bound


@functools.cache
def _factors(bound: int) -> list[tuple[int, int]]:
    """List all pairs of positive numbers whose product is at most `bound`."""
    return [(left, right) for left in range(1, bound + 1) for right in range(1, bound // left + 1)]
