"""APR as a program: it must rebuild its demonstrations token by token, and give every failure a reason."""

from collections import Counter

import numpy as np
import pytest

from apr_jax.engine.threads import RolloutKey, StopReason
from apr_jax.reasoning.adaptive import adaptive
from apr_jax.reasoning.base import Outcome
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.adaptive import ADAPTIVE, render_spawn
from apr_jax.tasks.countdown.rules import Problem, verify
from apr_jax.tasks.dialect import CALL_BEGIN, CALL_END
from tests.reasoning.fixtures import (
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
STATE_5_4 = "Moving to Node #0,0\nCurrent State: 24:[4, 5], Operations: ['3+2=5']\n"
STATE_6_4 = "Moving to Node #0,1\nCurrent State: 24:[4, 6], Operations: ['2*3=6']\n"
EXPLORED = (
    "Exploring Operation: 3+2=5, Resulting Numbers: [4, 5]\n"
    "Generated Node #0,0: 24:[4, 5] Operation: 3+2=5\n"
    "Exploring Operation: 2*3=6, Resulting Numbers: [4, 6]\n"
    "Generated Node #0,1: 24:[4, 6] Operation: 2*3=6\n"
)
SPAWN = EXPLORED + render_spawn(["0,0", "0,1"])
LAST = "Exploring Operation: 4*6=24, Resulting Numbers: [24]\n24,24 equal: Goal Reached\n"
LOSES = "Exploring Operation: 4*5=20, Resulting Numbers: [20]\n20,24 unequal: No Solution\nNo solution found.\n"
WINS = LAST + STATE_6_4 + LAST
PARENT_WINS = (
    "Moving to Node #0\nCurrent State: 24:[2, 3, 4], Operations: []\n"
    "Exploring Operation: 2*3=6, Resulting Numbers: [4, 6]\nGenerated Node #0,1: 24:[4, 6] Operation: 2*3=6\n"
    + STATE_6_4
    + LAST
)
GOOD = {(): [SPAWN, PARENT_WINS], (0, 0): [LOSES], (0, 1): [WINS]}


def run(texts, problem=PROBLEM, engine=None, **changes):
    engine = engine or {}
    scripted = ScriptedEngine(TextScript(texts), **engine)
    return scripted.run([(RolloutKey(0, 0), adaptive(problem, settings(**changes)))])[0]


def joined(rollout) -> str:
    """The parent's context after its join, from where the spawn stood."""
    text = TOKENIZER.decode(rollout.calls[1].context)
    return text.removeprefix(PROMPT + EXPLORED)


@pytest.mark.parametrize("budget", [False, True])
@pytest.mark.parametrize("task", [SMALL, REFERENCE], ids=["small", "reference"])
def test_rebuilds_demonstrations_token_by_token(task, budget):
    spawned = 0
    for demo in demonstrations(task, "adaptive", 12 if task is REFERENCE else 40, budget=budget):
        children = [call for call in demo.calls if call.depth == 1]
        parents = [call for call in demo.calls if call.depth == 0]
        engine = ScriptedEngine(Replay([demo]))
        asked = settings(budget=len(children) if budget else None)
        (rollout,) = engine.run([(RolloutKey(0, 0), adaptive(demo.problem, asked))])
        outcome: Outcome = rollout.result
        assert outcome.answer == demo.answer
        assert outcome.status == ("no_solution" if demo.answer is None else "answered")
        assert (outcome.num_children, outcome.num_spawns) == (len(children), len(parents) - 1)
        assert outcome.child_reasons == ()
        seen = Counter((tuple(call.context.tolist()), tuple(call.tokens.tolist())) for call in rollout.calls)
        assert seen == Counter(map(call_tokens, demo.calls))
        assert verify(outcome.answer, demo.problem).correct == demo.correct
        spawned += outcome.num_spawns
    assert spawned > 5


def test_join_replaces_the_spawn_text():
    rollout = run(GOOD)
    assert joined(rollout) == (
        "<Sub Searches>\n<No Solution in Sub Search 0 at level 1 at Node #0,0>\n"
        "<Goal Reached in Sub Search 1 at level 1 at Node #0,1>\n" + STATE_6_4 + LAST + "<End Sub Searches>\n"
    )
    outcome = rollout.result
    assert (outcome.status, outcome.num_spawns, outcome.num_children) == ("answered", 1, 2)
    assert verify(outcome.answer, PROBLEM).correct
    assert outcome.child_paths == ((STATE_6_4 + LAST).rstrip("\n"),)
    parent = [len(call.tokens) for call in rollout.calls if call.path == ()]
    children = [len(call.tokens) for call in rollout.calls if call.path]
    assert rollout.sequential_tokens == sum(parent) + max(children)


@pytest.mark.parametrize(
    ("child", "reason"),
    [
        ("Exploring Operation: 4*6=24, Resulting Numbers: [24]\n", "unfinished"),
        (LAST, "no_replay"),
        (EXPLORED + render_spawn(["0,1,0"], level=2), "unknown_node"),
        (CALL_BEGIN + CALL_END, "empty_spawn"),
    ],
)
def test_a_failed_child_hands_back_no_solution_and_its_reason_is_counted(child, reason):
    rollout = run({(): [SPAWN, trace.NO_SOLUTION], (0, 0): [LOSES], (0, 1): [child]})
    assert "<No Solution in Sub Search 1 at level 1 at Node #0,1>" in joined(rollout)
    assert rollout.result.child_reasons == (reason,)
    assert (rollout.result.status, rollout.result.num_children) == ("no_solution", 2)


def test_a_child_that_is_cut_off_is_counted():
    longest = len(TOKENIZER.encode(SPAWN)) + len(TOKENIZER.encode(PARENT_WINS)) + 1
    long = {**GOOD, (0, 0): [LOSES * 40]}
    assert run(long, engine={"max_steps": longest}).result.child_reasons == ("max_steps",)
    assert run(long, engine={"max_seq_len": 300}).result.child_reasons == ("context_full",)


@pytest.mark.parametrize(
    ("engine", "reason"), [({"max_steps": 60}, "max_steps"), ({"max_seq_len": 115}, "context_full")]
)
def test_a_parent_that_is_cut_off_has_no_answer(engine, reason):
    outcome = run(GOOD, engine=engine).result
    assert (outcome.answer, outcome.status, outcome.reason) == (None, "truncated", reason)


def test_a_join_may_fill_the_context():
    lengths = [len(TOKENIZER.encode(text)) for text in (PROMPT, SPAWN)]
    outcome = run(GOOD, engine={"max_seq_len": 1 + sum(lengths)}).result
    assert (outcome.status, outcome.reason, outcome.num_children) == ("truncated", "context_full", 2)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (EXPLORED + render_spawn(["0,7"]), "unknown_node"),
        (EXPLORED + render_spawn(["0,0", "0,0"]), "duplicate_node"),
        (EXPLORED + render_spawn(["0,0"], level=2), "wrong_level"),
        (EXPLORED + CALL_END, "no_call_begin"),
        (EXPLORED, "unfinished"),
        (LAST, "no_replay"),
    ],
)
def test_a_malformed_parent_ends_with_a_reason(text, reason):
    outcome = run({(): [text]}).result
    assert (outcome.answer, outcome.status, outcome.reason) == (None, "malformed", reason)
    assert outcome.num_spawns == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_children": 1}, "too_many_children"),
        ({"max_spawns": 0}, "too_many_spawns"),
        ({"max_depth": 0}, "too_deep"),
        ({"max_total_children": 1}, "rollout_children"),
    ],
)
def test_each_cap_has_its_own_reason(changes, reason):
    outcome = run(GOOD, **changes).result
    assert (outcome.status, outcome.reason) == ("malformed", reason)
    assert run(GOOD, max_children=2, max_spawns=1, max_depth=1, max_total_children=2).result.status == "answered"


def test_max_spawns_counts_a_threads_own_spawns():
    again = "Exploring Operation: 4-2=2, Resulting Numbers: [3, 2]\nGenerated Node #0,2: 24:[3, 2] Operation: 4-2=2\n"
    second = again + render_spawn(["0,2"])
    texts = {**GOOD, (): [SPAWN, second, PARENT_WINS], (1, 0): ["No solution found.\n"]}
    assert run(texts, max_spawns=2).result.num_children == 3
    outcome = run(texts, max_spawns=1).result
    assert (outcome.reason, outcome.num_spawns, outcome.num_children) == ("too_many_spawns", 1, 2)


def test_max_total_children_counts_the_children_of_all_spawns():
    again = "Exploring Operation: 4-2=2, Resulting Numbers: [3, 2]\nGenerated Node #0,2: 24:[3, 2] Operation: 4-2=2\n"
    second = again + render_spawn(["0,2"])
    texts = {**GOOD, (): [SPAWN, second, PARENT_WINS], (1, 0): ["No solution found.\n"]}
    assert run(texts, max_total_children=3).result.num_children == 3
    outcome = run(texts, max_total_children=2).result
    assert (outcome.reason, outcome.num_spawns, outcome.num_children) == ("rollout_children", 1, 2)


def test_a_rollouts_tokens_are_counted_over_all_threads():
    """Each share is exact: with one token less the thread that needs it all is cut off."""
    spawn, last, loses, wins = (len(TOKENIZER.encode(text)) for text in (SPAWN, PARENT_WINS, LOSES, WINS))
    needed = spawn + 3 * (wins + 1)  # a third for each child and a third for the parent
    assert last < wins + (wins - loses)
    assert run(GOOD, engine={"max_total_tokens": needed}).result.status == "answered"
    outcome = run(GOOD, engine={"max_total_tokens": needed - 1}).result
    assert outcome.child_reasons == ("rollout_tokens",)
    outcome = run(GOOD, engine={"max_total_tokens": spawn - 1}).result
    assert (outcome.answer, outcome.status, outcome.reason) == (None, "truncated", "rollout_tokens")


class Gluing:
    """The built-in tokens, with the text of the one that opens a spawn glued to the token before it."""

    def __getattr__(self, name):
        return getattr(TOKENIZER, name)

    def token_bytes(self, ids, before=()):
        pieces = TOKENIZER.token_bytes(ids, before)
        for place in (index for index, piece in enumerate(pieces) if piece == CALL_BEGIN.encode()):
            pieces[place - 1 : place + 1] = pieces[place - 1] + pieces[place], b""
        return pieces


def test_where_a_spawn_begins_inside_a_token_the_characters_before_it_stay():
    rollout = run(GOOD, tokenizer=Gluing())
    assert rollout.result == run(GOOD).result
    assert [call.context.tolist() for call in rollout.calls] == [call.context.tolist() for call in run(GOOD).calls]


def test_spawns_nest_when_depth_allows():
    problem = Problem((1, 2, 3, 4), 24)
    root = (
        "Exploring Operation: 2*1=2, Resulting Numbers: [3, 4, 2]\nGenerated Node #0,0: 24:[3, 4, 2] Operation: 2*1=2\n"
    )
    child = (
        "Exploring Operation: 3*4=12, Resulting Numbers: [2, 12]\nGenerated Node #0,0,0: 24:[2, 12] Operation: 3*4=12\n"
    )
    texts = {
        (): [root + render_spawn(["0,0"]), "No solution found.\n"],
        (0, 0): [child + render_spawn(["0,0,0"], level=2), "No solution found.\n"],
        (0, 0, 0, 0): ["No solution found.\n"],
    }
    rollout = run(texts, problem, max_depth=2)
    assert (rollout.result.num_spawns, rollout.result.num_children) == (2, 2)
    assert [call.path for call in rollout.calls] == [(), (), (0, 0), (0, 0), (0, 0, 0, 0)]
    grandchild = TOKENIZER.decode(rollout.calls[-1].context)
    assert grandchild == "Moving to Node #0,0,0\nCurrent State: 24:[2, 12], Operations: ['2*1=2', '3*4=12']\n"
    assert "in Sub Search 0 at level 2 at Node #0,0,0>" in TOKENIZER.decode(rollout.calls[3].context)
    assert run(texts, problem, max_depth=1).result.child_reasons == ("too_deep",)
    assert rollout.sequential_tokens == sum(len(call.tokens) for call in rollout.calls)


def test_cancel_on_success_joins_the_others_as_no_solution():
    slow = {**GOOD, (0, 0): [LOSES.replace("No solution found.\n", "") * 9 + "No solution found.\n"]}
    patient, eager = run(slow), run(slow, cancel_on_success=True)
    assert joined(patient) == joined(eager)
    assert eager.result.child_reasons == ()
    assert eager.sequential_tokens < patient.sequential_tokens


@pytest.mark.parametrize("lanes", [1, 2, 16])
def test_what_a_success_cancels_depends_on_no_schedule(lanes):
    """The loser is cut at the winner's clock, whether it had run far ahead, beside it or not at all."""
    slow = {**GOOD, (0, 0): [LOSES.replace("No solution found.\n", "") * 9 + "No solution found.\n"]}
    engine = ForcedEngine(TextScript(slow), lanes=lanes, max_seq_len=640, pages=42)
    rollout = engine.run([(RolloutKey(0, 0), adaptive(PROBLEM, settings(cancel_on_success=True)))])[0]
    loser, winner = ([call for call in rollout.calls if call.path == (0, child)] for child in (0, 1))
    assert (
        [len(call.tokens) for call in loser]
        == [len(call.tokens) for call in winner]
        == [len(TOKENIZER.encode(WINS)) + 1]
    )
    assert (loser[0].stop.reason, winner[0].stop.reason) == (StopReason.CANCELLED, StopReason.TOKEN)
    assert (rollout.result.status, rollout.result.child_reasons) == ("answered", ())
    parent = [len(call.tokens) for call in rollout.calls if call.path == ()]
    assert rollout.sequential_tokens == sum(parent) + len(winner[0].tokens)


def test_budget_stands_in_the_prompt():
    rollout = run(GOOD, budget=10)
    assert TOKENIZER.decode(rollout.calls[0].context) == "Sub Call Budget: 10 " + PROMPT
    assert rollout.calls[0].context[0] == TOKENIZER.bos_id
    assert rollout.calls[0].stop.reason is StopReason.TOKEN
    np.testing.assert_array_equal(rollout.calls[0].context[1:], TOKENIZER.encode("Sub Call Budget: 10 " + PROMPT))
