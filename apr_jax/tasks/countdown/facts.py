"""Bare arithmetic: operations as they are written in a trace, with no target that gives the result away.

Comparisons of a result with the target come, too: in a search hardly any is true. And where searches leave nothing out,
states come with the operations that follow one another in them: in a search hardly any two numbers divide.
"""

import functools
import random

from apr_jax.config import ConfigError
from apr_jax.tasks.countdown import rules, trace
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.search import Search

_MAX_DRAWS = 100_000
_LARGEST_BOUND = 100_000
_ALL = 99  # operations, of which a state has fewer


def draw_fact(rng: random.Random, section: CountdownConfig) -> tuple[str, str]:
    """Draw a random operation, the comparison of a result with a target, or a state with a step of its search.

    Searches that leave nothing out have such states in one of eight cases; all others have none.

    Sums and differences, of which there are more, come twice as often as products and quotients. One number of a sum or
    difference is like those of a problem; the other is, too, in half of the cases, and any number up to the bound in
    the rest. All products are equally likely, and so are all quotients. In half of the comparisons the two are equal.
    In half of the states a number divides one of the others.

    With `task.attempts` half of the products and quotients have no result, or too large a one, and end before `=`.

    Return what is given of the text, up to `=` (with `task.attempts` to the second number), to the target or to the
    state, and the rest. No result is above `largest_result(section)`. Raises ConfigError where there are no sums.
    """
    bound = largest_result(section)
    leaves_nothing_out = section.heuristic == "none" and not section.shuffle
    operator = rng.choice("++--*/?:" if leaves_nothing_out else "++--*/?")
    if operator == ":":
        return _step(rng, section, bound)
    if operator == "?":
        target = rng.randint(section.min_target, section.max_target)
        result = target if rng.random() < 0.5 else rng.randint(0, bound)
        outcome = trace.outcome_line(target, result)
        given = f"{result},{target}"
        return given, outcome[len(given) : -1]
    if section.attempts and operator != "?":
        return _attempt(rng, section, operator, bound)
    if operator in "*/":
        left, right = rng.choice(_factors(bound))
        if operator == "/":
            return f"{left * right}/{left}=", str(right)
        return f"{left}*{right}=", str(left * right)
    for _ in range(_MAX_DRAWS):
        left = rng.randint(section.min_number, section.max_number)
        right = rng.randint(section.min_number, section.max_number) if rng.random() < 0.5 else rng.randint(0, bound)
        left, right = (left, right) if rng.random() < 0.5 else (right, left)
        if operator == "-":
            return f"{max(left, right)}-{min(left, right)}=", str(abs(left - right))
        if left + right <= bound:
            return f"{left}+{right}=", str(left + right)
    raise ConfigError(
        f"none of {_MAX_DRAWS} draws of a number in {section.min_number}..{section.max_number} gives a sum up to "
        f"{bound}: raise task.max_result, or set data.facts_share=0"
    )


def _attempt(rng: random.Random, section: CountdownConfig, operator: str, bound: int) -> tuple[str, str]:
    """Draw two numbers and an operator. Return them, and `=` with the result; "" where there is none up to `bound`."""
    if operator in "*/" and rng.random() < 0.5:
        left, right = rng.choice(_factors(bound))
        left, right = (left * right, left) if operator == "/" else (left, right)
    else:
        left = rng.randint(section.min_number, section.max_number)
        right = rng.randint(section.min_number, section.max_number) if rng.random() < 0.5 else rng.randint(0, bound)
        left, right = (left, right) if rng.random() < 0.5 else (right, left)
        left, right = (max(left, right), min(left, right)) if operator in "-/" else (left, right)
    asked = f"{left}{operator}{right}"
    found = (text for result, text in rules.operations(left, right) if result <= bound and text.startswith(f"{asked}="))
    return asked, next(found, asked).removeprefix(asked)


def _step(rng: random.Random, section: CountdownConfig, bound: int) -> tuple[str, str]:
    """Draw a state of two to four numbers. Return what stands before a step of its search, and the step.

    Of two numbers that is a prompt and the whole search, which is in vain. Of more, where searches restate, it is the
    state, an operation on two of its numbers, and the state again; then the next operation and the attempts before it,
    or that there is none.
    """
    count = rng.choice((2, 3, 4) if section.restate else (2,))
    low, high = (section.min_number, section.max_number) if count == 4 else (0, bound)
    numbers = [rng.randint(low, high) for _ in range(count)]
    i, j = sorted(rng.sample(range(count), 2))
    if rng.random() < 0.5:
        factor, other = rng.choice(_factors(high))
        numbers[i], numbers[j] = rng.sample((factor * other, other), 2)
    combined = [(result, text) for result, text in rules.operations(numbers[i], numbers[j]) if result <= bound]
    targets = set(range(section.min_target, section.max_target + 1)) - {result for result, _ in combined}
    target = rng.choice(sorted(targets or {bound + 1}))
    search = Search(Problem(tuple(numbers), target), rng, section)
    if count == 2:
        lines: list[str] = []
        search.depth_first(search.root, len(combined), lines)
        return search.header(search.root), "".join([*lines, trace.NO_SOLUTION])[:-1]
    node = search.root
    if count == 3:  # as a child has it: its last number is a result
        left = rng.randint(0, numbers[-1])
        made = f"'{left}+{numbers[-1] - left}={numbers[-1]}'"
        node = node._replace(node_id=f"{node.node_id},{rng.randrange(24)}", operations=made)
    written: list[str] = []
    children, _ = search.expand(node, _ALL, written)
    of_pair = tuple(f"'{text}'" for _, text in combined)
    steps = [index for index, child in enumerate(children) if child.operations.endswith(of_pair)]
    done = rng.choice(steps or range(len(children)))
    header = search.header(node)
    last = "".join([*written[len(children) :], trace.NO_SOLUTION])
    follows = written[done + 1].rpartition("Generated Node")[0] if done + 1 < len(children) else last
    return header + children[done].generated + header, follows[:-1]


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
