"""PASTA as a program: it rebuilds its demonstrations, its clock runs beside its children, and failures have reasons."""

import pytest

from apr_jax.engine.threads import RolloutKey, StopReason
from apr_jax.reasoning.pasta import pasta
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.adaptive import ADAPTIVE, render_spawn
from apr_jax.tasks.countdown.pasta import SYNC
from apr_jax.tasks.countdown.rules import Problem, verify
from apr_jax.tasks.dialect import CALL_END
from tests.reasoning.fixtures import (
    DEPTH_FIRST,
    REFERENCE,
    SMALL,
    TOKENIZER,
    Replay,
    TextScript,
    call_tokens,
    demonstrations,
    settings,
)
from tests.reasoning.forced_engine import ForcedEngine
from tests.reasoning.scripted_engine import ScriptedEngine

PROBLEM = Problem((2, 3, 4), 24)
PROMPT = ADAPTIVE.prompt(PROBLEM)
HEADER_5 = "Moving to Node #0,0\nCurrent State: 24:[4, 5], Operations: ['2+3=5']\n"
HEADER_6 = "Moving to Node #0,1\nCurrent State: 24:[4, 6], Operations: ['2*3=6']\n"
EXPLORED = (
    "Exploring Operation: 2+3=5, Resulting Numbers: [4, 5]\n"
    "Generated Node #0,0: 24:[4, 5] Operation: 2+3=5\n"
    "Exploring Operation: 2*3=6, Resulting Numbers: [4, 6]\n"
    "Generated Node #0,1: 24:[4, 6] Operation: 2*3=6\n"
)
SPAWN = EXPLORED + render_spawn(["0,1"])
LAST = "Exploring Operation: 4*6=24, Resulting Numbers: [24]\n24,24 equal: Goal Reached\n"
OWN = HEADER_5 + "Exploring Operation: 4*5=20, Resulting Numbers: [20]\n20,24 unequal: No Solution\n" + SYNC
WINS = LAST + HEADER_6 + LAST
REPLAY = (
    "24,24 equal: Goal Reached\nMoving to Node #0\nCurrent State: 24:[2, 3, 4], Operations: []\n"
    "Exploring Operation: 2*3=6, Resulting Numbers: [4, 6]\nGenerated Node #0,1: 24:[4, 6] Operation: 2*3=6\n"
    + HEADER_6
    + LAST
)
GOOD = {(): [SPAWN, OWN, REPLAY], (0, 0): [WINS]}


def length(*texts):
    """Tokens of texts that end a call; EOS counts where it is neither a spawn nor a sync."""
    return sum(len(TOKENIZER.encode(text)) + (not text.endswith((SYNC, CALL_END))) for text in texts)


def forced(lanes):
    return lambda script: ForcedEngine(script, lanes=lanes, max_seq_len=640, pages=82)


def run(texts, engine=ScriptedEngine, **changes):
    return engine(TextScript(texts)).run([(RolloutKey(0, 0), pasta(PROBLEM, settings(**changes)))])[0]


@pytest.mark.parametrize("task", [SMALL, REFERENCE, DEPTH_FIRST], ids=["small", "reference", "depth_first"])
def test_rebuilds_demonstrations_token_by_token(task):
    """Every call of every thread, and so every context in which children's full text stands."""
    solved = waited = ended_alone = 0
    for demo in demonstrations(task, "pasta", 20, budget=True):
        children = sum(call.depth for call in demo.calls)
        (rollout,) = ScriptedEngine(Replay([demo])).run(
            [(RolloutKey(0, 0), pasta(demo.problem, settings(budget=children)))]
        )
        expected = sorted(call_tokens(call) for call in demo.calls)
        assert sorted((tuple(c.context.tolist()), tuple(c.tokens.tolist())) for c in rollout.calls) == expected
        outcome = rollout.result
        assert outcome.answer == demo.answer
        assert verify(outcome.answer, demo.problem).correct == demo.correct
        assert (outcome.num_children, outcome.child_reasons) == (children, ())
        solved += demo.correct
        waited += any(call.completion.endswith(SYNC) for call in demo.calls)
        ended_alone += children > 0 and not any(call.completion.endswith(SYNC) for call in demo.calls)
    assert solved > 0
    assert waited > 0
    assert task is REFERENCE or ended_alone > 0


@pytest.mark.parametrize("engine", [ScriptedEngine, forced(1), forced(8)], ids=["scripted", "one_lane", "eight_lanes"])
def test_the_childs_full_text_comes_back_and_the_parent_does_not_wait_before(engine):
    rollout = run(GOOD, engine)
    contexts = [TOKENIZER.decode(call.context) for call in rollout.calls if call.path == ()]
    assert contexts == [
        PROMPT,
        PROMPT + SPAWN,
        PROMPT + SPAWN + OWN + "<Sub Searches>\n<Goal Reached in Sub Search 0 at level 1 at Node #0,1>\n"
        f"{HEADER_6}{WINS}<End Sub Searches>\n",
    ]
    assert verify(rollout.result.answer, PROBLEM).correct
    assert rollout.result.child_paths == ((HEADER_6 + LAST).rstrip("\n"),)
    assert sum(len(call.tokens) for call in rollout.calls) == length(SPAWN, OWN, REPLAY, WINS)
    # What the parent writes beside its child costs no time of its own: the longer of the two counts.
    assert rollout.sequential_tokens == length(SPAWN) + max(length(OWN), length(WINS)) + length(REPLAY)
    assert [call.clock_start for call in rollout.calls if call.path == ()][:2] == [0, length(SPAWN)]
    assert [call.clock_start for call in rollout.calls if call.path] == [length(SPAWN)]


@pytest.mark.parametrize("engine", [ScriptedEngine, forced(2)], ids=["scripted", "two_lanes"])
@pytest.mark.parametrize("times", [1, 9])
def test_the_longer_of_parent_and_child_is_waited_for(engine, times):
    own = OWN.replace(SYNC, "") * times + SYNC
    rollout = run({**GOOD, (): [SPAWN, own, REPLAY]}, engine)
    assert (length(own) > length(WINS)) == (times == 9)
    assert rollout.sequential_tokens == length(SPAWN) + max(length(own), length(WINS)) + length(REPLAY)


@pytest.mark.parametrize("engine", [ScriptedEngine, forced(2)], ids=["scripted", "two_lanes"])
def test_a_parent_that_ends_alone_is_charged_for_the_children_that_are_out(engine):
    alone = HEADER_6 + LAST + REPLAY.partition("\n")[2]
    rollout = run({(): [SPAWN, alone], (0, 0): [WINS * 3]}, engine)
    assert (rollout.result.status, rollout.result.num_children) == ("answered", 1)
    assert rollout.sequential_tokens == length(SPAWN) + max(length(alone), length(WINS * 3))
    assert [len(call.tokens) for call in rollout.calls if call.path == ()] == [length(SPAWN), length(alone)]


def test_a_parent_may_spawn_again_before_it_waits():
    more = "Exploring Operation: 4-2=2, Resulting Numbers: [3, 2]\nGenerated Node #0,2: 24:[3, 2] Operation: 4-2=2\n"
    texts = {
        (): [SPAWN, more + render_spawn(["0,2"]), SYNC, REPLAY],
        (0, 0): [WINS],
        (1, 0): [trace.NO_SOLUTION],
    }
    rollout = run(texts)
    context = TOKENIZER.decode(rollout.calls[3].context)
    assert context.count("<Sub Searches>\n") == context.count("<End Sub Searches>\n") == 2
    assert context.index("at Node #0,1>") < context.index("<No Solution in Sub Search 0 at level 1 at Node #0,2>")
    assert (rollout.result.num_spawns, rollout.result.num_children) == (2, 2)


@pytest.mark.parametrize(
    ("child", "reason", "text"),
    [
        (LAST, "no_replay", LAST),
        (EXPLORED[:-1], "unfinished", EXPLORED.partition("\n")[0] + "\n" + "\n".join(EXPLORED.split("\n")[1:3]) + "\n"),
        (render_spawn(["0,1,0"], level=2), "too_deep", render_spawn(["0,1,0"], level=2)),
    ],
)
def test_a_failed_childs_whole_lines_come_back_and_its_reason_is_counted(child, reason, text):
    rollout = run({(): [SPAWN, SYNC, trace.NO_SOLUTION], (0, 0): [child]})
    context = TOKENIZER.decode(rollout.calls[2].context)
    assert context.endswith(
        f"<No Solution in Sub Search 0 at level 1 at Node #0,1>\n{HEADER_6}{text}<End Sub Searches>\n"
    )
    assert rollout.result.child_reasons == (reason,)
    assert rollout.result.status == "no_solution"


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ([SYNC], "nothing_to_wait_for"),
        ([SPAWN, SYNC, SYNC], "nothing_to_wait_for"),
        ([EXPLORED + render_spawn(["0,7"])], "unknown_node"),
        ([SPAWN, EXPLORED], "unfinished"),
    ],
)
def test_a_malformed_parent_ends_with_a_reason(texts, reason):
    outcome = run({(): texts, (0, 0): [WINS]}).result
    assert (outcome.answer, outcome.status, outcome.reason) == (None, "malformed", reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_children": 0}, "too_many_children"),
        ({"max_spawns": 0}, "too_many_spawns"),
        ({"max_depth": 0}, "too_deep"),
        ({"max_total_children": 0}, "rollout_children"),
    ],
)
def test_each_cap_has_its_own_reason(changes, reason):
    assert run(GOOD, **changes).result.reason == reason


def test_a_parent_that_is_cut_off_has_no_answer():
    outcome = run(GOOD, lambda script: ScriptedEngine(script, max_steps=length(SPAWN) + 3)).result
    assert (outcome.answer, outcome.status, outcome.reason) == (None, "truncated", "max_steps")
    assert outcome.num_children == 1


def test_the_first_success_cancels_siblings_which_have_no_text():
    slow = "Exploring Operation: 4*5=20, Resulting Numbers: [20]\n20,24 unequal: No Solution\n" * 9 + trace.NO_SOLUTION
    texts = {(): [EXPLORED + render_spawn(["0,0", "0,1"]), SYNC, REPLAY], (0, 0): [slow], (0, 1): [WINS]}
    rollout = run(texts, forced(4), cancel_on_success=True)
    assert [call.stop.reason for call in rollout.calls if call.path] == [StopReason.CANCELLED, StopReason.TOKEN]
    context = TOKENIZER.decode(rollout.calls[2].context)
    assert "<No Solution in Sub Search 0 at level 1 at Node #0,0>\n<Goal Reached in Sub Search 1" in context
    assert verify(rollout.result.answer, PROBLEM).correct


def test_a_mark_that_is_no_token_is_found_in_the_text():
    class Spelling:
        def __getattr__(self, name):
            return getattr(TOKENIZER, name)

        def mark_id(self, mark):
            return None if mark == SYNC else TOKENIZER.mark_id(mark)

    rollout, expected = run(GOOD, tokenizer=Spelling()), run(GOOD)
    assert rollout.result == expected.result
    assert [call.stop.string for call in rollout.calls].count(SYNC) == 1
