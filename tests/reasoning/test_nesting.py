"""Spawns within spawns, four levels deep: texts that were written for it, through both test engines."""

import pytest

from apr_jax.engine.threads import RolloutKey
from apr_jax.reasoning.adaptive import adaptive
from apr_jax.tasks import trace
from apr_jax.tasks.countdown import Problem
from tests.reasoning.fixtures import TOKENIZER, TextScript, settings
from tests.reasoning.forced_engine import ForcedEngine
from tests.reasoning.scripted_engine import ScriptedEngine

DEPTH = 4
PROBLEM = Problem((1, 2, 3, 4, 5, 6), 100)


def explored(node, numbers):
    """Two operations on a node's first two numbers, and the nodes that they generate."""
    a, b, *rest = numbers
    text, nodes = "", []
    for index, (operation, value) in enumerate(((f"{a}+{b}", a + b), (f"{a}*{b}", a * b))):
        child, left = f"{node},{index}", [*rest, value]
        text += f"Exploring Operation: {operation}={value}, Resulting Numbers: {left}\n"
        text += f"Generated Node #{child}: 100:{left} Operation: {operation}={value}\n"
        nodes.append((child, left))
    return text, nodes


def nested(path=(), node="0", numbers=PROBLEM.numbers, level=1):
    """What each thread writes: the upper ones explore, spawn both nodes and then give up, the last give up at once."""
    if level > DEPTH:
        return {path: [trace.NO_SOLUTION]}
    text, nodes = explored(node, numbers)
    texts = {path: [text + trace.render_spawn([child for child, _ in nodes], level=level), trace.NO_SOLUTION]}
    for index, (child, left) in enumerate(nodes):
        texts |= nested((*path, 0, index), child, left, level + 1)
    return texts


def run(engine=None, **changes):
    engine = engine or ScriptedEngine(TextScript(nested()))
    asked = settings(**{"max_depth": DEPTH, "max_children": 2, **changes})
    return engine.run([(RolloutKey(0, 0), adaptive(PROBLEM, asked))])[0]


def test_four_levels_are_spawned_and_joined():
    rollout = run()
    assert (rollout.result.num_spawns, rollout.result.num_children) == (15, 30)
    assert rollout.result.child_reasons == ()
    assert max(len(call.path) for call in rollout.calls) == 2 * DEPTH
    deepest = [TOKENIZER.decode(call.context) for call in rollout.calls if len(call.path) == 2 * DEPTH]
    assert len(set(deepest)) == 2**DEPTH
    assert all(f"in Sub Search 1 at level {level} at Node" in _joins(rollout) for level in range(1, DEPTH + 1))


def _joins(rollout):
    return "".join(TOKENIZER.decode(call.context) for call in rollout.calls)


@pytest.mark.parametrize(("lanes", "pages"), [(1, 34), (3, 40), (16, 300)])
def test_the_engine_runs_them_as_the_script_does(lanes, pages):
    engine = ForcedEngine(TextScript(nested()), lanes=lanes, max_seq_len=512, pages=pages)
    forced, scripted = run(engine), run()
    assert forced.result == scripted.result
    assert forced.sequential_tokens == scripted.sequential_tokens
    for one, other in zip(forced.calls, scripted.calls, strict=True):
        assert (one.path, one.context.tolist(), one.tokens.tolist()) == (
            other.path,
            other.context.tolist(),
            other.tokens.tolist(),
        )
        assert (one.stop, one.clock_start) == (other.stop, other.clock_start)
    assert engine.held[-1] == 0


def test_one_level_more_than_allowed_is_too_deep():
    rollout = run(max_depth=DEPTH - 1)
    assert rollout.result.child_reasons == ("too_deep",) * 8
    assert rollout.result.num_children == 2 + 4 + 8


@pytest.mark.parametrize(
    ("cap", "children", "refused"),
    [(80, 30, 0), (79, 14, 8), (26, 14, 8), (25, 6, 4), (8, 6, 4), (7, 2, 2), (2, 2, 2)],
)
def test_a_cap_on_all_children_is_shared_out(cap, children, refused):
    """A spawn of two leaves a third of the rest to each child: 80 = 2 + 3 (2 + 3 (2 + 3 x 2)) is what it takes."""
    rollout = run(max_total_children=cap)
    assert len({call.path for call in rollout.calls}) - 1 == children <= cap
    assert rollout.result.child_reasons == ("rollout_children",) * refused


def test_a_root_out_of_children_is_malformed():
    outcome = run(max_total_children=1).result
    assert (outcome.status, outcome.reason, outcome.num_children) == ("malformed", "rollout_children", 0)
