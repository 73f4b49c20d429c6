"""Spawns within spawns, through both test engines: texts four levels deep, and demonstrations; context windows."""

import dataclasses
import random
from collections import Counter

import pytest

from apr_jax.config_dict import from_config_dict
from apr_jax.engine.threads import RolloutKey
from apr_jax.reasoning.adaptive import adaptive
from apr_jax.reasoning.settings import make_settings
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.adaptive import render_spawn
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.task import COUNTDOWN
from apr_jax.tasks.dialect import demonstrated_tokens
from apr_jax.tasks.generation import demonstrate
from configs.grpo import get_config
from tests.reasoning.fixtures import SMALL, TOKENIZER, Replay, TextScript, call_tokens, demonstrations, settings
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
    texts = {path: [text + render_spawn([child for child, _ in nodes], level=level), trace.NO_SOLUTION]}
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


NESTED = dataclasses.replace(SMALL, num_numbers=4, max_number=10, spawn_depth=2, child_beam_max=4)


def test_nested_demonstrations_are_rebuilt_and_counted_as_the_engine_counts():
    """Calls in order of `Demonstration`, the longest chain over both levels, and all tokens."""
    below, solved = 0, 0
    for demo in demonstrations(NESTED, "adaptive", 6, budget=True):
        children = sum(call.depth == 1 and not call.ends_in_spawn for call in demo.calls)
        asked = settings(max_depth=2, budget=children)
        (rollout,) = ScriptedEngine(Replay([demo])).run([(RolloutKey(0, 0), adaptive(demo.problem, asked))])
        rebuilt = [(tuple(call.context.tolist()), tuple(call.tokens.tolist())) for call in rollout.calls]
        assert rebuilt == [call_tokens(call) for call in demo.calls]
        assert rollout.result.answer == demo.answer
        assert rollout.result.child_reasons == ()
        counted = demonstrated_tokens(COUNTDOWN.dialects["adaptive"], demo, lambda text: len(TOKENIZER.encode(text)))
        peak = max(len(call.context) + len(call.tokens) for call in rollout.calls)
        assert counted == (rollout.sequential_tokens, sum(len(call.tokens) for call in rollout.calls), peak)
        below += sum(call.depth == 2 for call in demo.calls)
        solved += demo.correct
    assert below > 0
    assert solved > 0


WINDOWS = (96, 192, 512)


def in_windows(seed, windows):
    task = dataclasses.replace(SMALL, context_windows=windows)
    problem = Problem((5, 7, 9 + seed), 20 + seed)
    return demonstrate(problem, random.Random(seed), task, "adaptive", True, lambda text: len(TOKENIZER.encode(text)))


def test_every_thread_names_the_smallest_window_that_holds_it():
    named = set()
    for seed in range(8):
        longest, told = Counter(), {}
        for call in in_windows(seed, WINDOWS).calls:
            node = trace.thread_node(call.context)
            longest[node] = max(longest[node], sum(map(len, call_tokens(call))))
            told[node] = int(call.context.partition("Token Budget: ")[2].split()[0])
        for node, window in told.items():
            smaller = [size for size in WINDOWS if size < window]
            assert longest[node] <= window
            assert longest[node] - 2 > max(smaller, default=0)  # 512 is spelt in two tokens more than the others
        named |= {*told.values()}
    assert named == set(WINDOWS)


def test_a_thread_is_told_its_window_and_held_to_it():
    """Parent and children; a window that holds them changes nothing, and one token less cuts the parent off."""
    demo = in_windows(1, (255,))
    children = sum(call.depth for call in demo.calls)
    longest = max(sum(map(len, call_tokens(call))) for call in demo.calls)
    assert longest < 255  # one token, as whatever smaller window the prompts name

    def run_in(window):
        replay = Replay([demo])
        for call in demo.calls:
            renamed = call.context.replace("Token Budget: 255 ", f"Token Budget: {window} ")
            replay.script[TOKENIZER.bos_id, *TOKENIZER.encode(renamed)] = call_tokens(call)[1]
        engine = ForcedEngine(replay, lanes=4, max_seq_len=640, pages=170)
        asked = settings(budget=children, context_window=window)
        return engine.run([(RolloutKey(0, 0), adaptive(demo.problem, asked))])[0].result

    assert run_in(255).answer == demo.answer
    assert run_in(longest).answer == demo.answer
    outcome = run_in(longest - 1)
    assert (outcome.answer, outcome.status, outcome.reason) == (None, "truncated", "context_full")
    assert set(run_in(60).child_reasons) <= {"context_full"}


def test_the_window_is_the_largest_that_demonstrations_name_or_the_one_asked_for():
    config = get_config()
    assert make_settings(from_config_dict(config), TOKENIZER).context_window is None
    config.task.context_windows = (128, 512)
    assert make_settings(from_config_dict(config), TOKENIZER).context_window == 512
    config.rollout.context_window = 128
    assert make_settings(from_config_dict(config), TOKENIZER).context_window == 128


def test_windows_need_a_counter():
    task = dataclasses.replace(SMALL, context_windows=WINDOWS)
    with pytest.raises(ValueError, match="pass count_tokens"):
        demonstrate(Problem((5, 7, 9), 20), random.Random(0), task, "adaptive", False)
