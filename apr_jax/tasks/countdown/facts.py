"""Bare arithmetic: operations as they are written in a trace, with no target that gives the result away."""

import functools
import random

from apr_jax.tasks.countdown.config import CountdownConfig


def draw_fact(rng: random.Random, task: CountdownConfig) -> tuple[str, int]:
    """Draw a random operation. Returns its text up to `=`, and its result, which is at most `largest_result(task)`.

    Sums and differences, of which there are more, come twice as often as products and quotients. One number of a sum or
    difference is like those of a problem; the other is, too, in half of the cases, and any number up to the bound in
    the rest. All products are equally likely, and so are all quotients.
    """
    bound = largest_result(task)
    operator = rng.choice("++--*/")
    if operator in "*/":
        left, right = rng.choice(_factors(bound))
        if operator == "/":
            return f"{left * right}/{left}=", right
        return f"{left}*{right}=", left * right
    while True:
        left = rng.randint(task.min_number, task.max_number)
        right = rng.randint(task.min_number, task.max_number) if rng.random() < 0.5 else rng.randint(0, bound)
        left, right = (left, right) if rng.random() < 0.5 else (right, left)
        if operator == "-":
            return f"{max(left, right)}-{min(left, right)}=", abs(left - right)
        if left + right <= bound:
            return f"{left}+{right}=", left + right


def largest_result(task: CountdownConfig) -> int:
    """Return the bound on results: that of the searches or, if they have none, the largest product of two numbers."""
    return task.max_result or task.max_number**2


@functools.cache
def _factors(bound: int) -> list[tuple[int, int]]:
    """List all pairs of positive numbers whose product is at most `bound`."""
    return [(left, right) for left in range(1, bound + 1) for right in range(1, bound // left + 1)]
