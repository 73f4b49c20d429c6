"""Tree of Thoughts as a program: both searches, its accounts, and what it does with text that is amiss."""

import dataclasses

import pytest

from apr_jax.engine.threads import RolloutKey
from apr_jax.reasoning.tree_of_thoughts import tree_of_thoughts
from apr_jax.tasks.countdown.rules import Problem, verify
from tests.reasoning.fixtures import LAPTOP, SMALL, TOKENIZER, Replay, demonstrations, settings
from tests.reasoning.forced_engine import ForcedEngine
from tests.reasoning.scripted_engine import ScriptedEngine

PROBLEM = Problem((2, 3, 4), 24)
STATE = "Current State: 24:[{}], Operations: []\n"
# What is written in answer to each prompt. 2*3=6 leads to the target by 6*4, 2+3=5 to nothing.
TEXTS = {
    STATE.format("2, 3, 4"): (
        "Exploring Operation: 2+3=5, Resulting Numbers: [4, 5]\nExploring Operation: 2*3=6, Resulting Numbers: [4, 6]\n"
    ),
    "24:[4, 5]\n": "4+5=9\n5-4=1\n4*5=20\nimpossible\n",
    "24:[4, 6]\n": "4+6=10\n6-4=2\n4*6=24\nsure\n",
    STATE.format("4, 5"): "Exploring Operation: 4*5=20, Resulting Numbers: [20]\n",
    STATE.format("4, 6"): (
        "Exploring Operation: 4+6=10, Resulting Numbers: [10]\nExploring Operation: 4*6=24, Resulting Numbers: [24]\n"
    ),
    "24:[20]\n": "impossible\n",
    "24:[10]\n": "impossible\n",
    "24:[24]\n": "sure\n",
}
ANSWER = (
    "Exploring Operation: 2*3=6, Resulting Numbers: [4, 6]\nExploring Operation: 4*6=24, Resulting Numbers: [24]\n"
    "24,24 equal: Goal Reached"
)


class Prompted:
    """Writes TEXTS, by prompt; counts how often each prompt was asked."""

    def __init__(self, **texts):
        self.texts, self.asked = TEXTS | texts.pop("texts", {}), []

    def __call__(self, path, tokens):
        self.asked.append(TOKENIZER.decode(tokens))
        return [*TOKENIZER.encode(self.texts[self.asked[-1]]), TOKENIZER.eos_id]


def length(*prompts):
    """Tokens that are written in answer to these prompts, EOS included."""
    return [len(TOKENIZER.encode(TEXTS[prompt])) + 1 for prompt in prompts]


def run(texts=None, engine=None, max_total_children=1000, **options):
    script = Prompted(texts=texts or {})
    engine = engine(script) if engine else ScriptedEngine(script)
    asked = settings(
        tree_of_thoughts=dataclasses.replace(LAPTOP.tree_of_thoughts, **options), max_total_children=max_total_children
    )
    return engine.run([(RolloutKey(0, 0), tree_of_thoughts(PROBLEM, asked))])[0], script.asked


FORCED = [lambda script, lanes=lanes: ForcedEngine(script, lanes=lanes, max_seq_len=128, pages=40) for lanes in (1, 8)]


@pytest.mark.parametrize("engine", [None, *FORCED], ids=["scripted", "one_lane", "eight_lanes"])
def test_breadth_first_counts_every_thread_and_the_longest_of_each_level(engine):
    rollout, asked = run(engine=engine)
    first, last = STATE.format("2, 3, 4"), [STATE.format("4, 5"), STATE.format("4, 6")]
    levels = [[first], ["24:[4, 5]\n", "24:[4, 6]\n"], last, ["24:[20]\n", "24:[10]\n", "24:[24]\n"]]
    assert sorted(asked) == sorted(prompt for level in levels for prompt in level)
    outcome = rollout.result
    assert (outcome.status, outcome.answer) == ("answered", ANSWER)
    assert verify(outcome.answer, PROBLEM).correct
    assert (outcome.num_spawns, outcome.num_children) == (4, 8)
    assert (outcome.child_reasons, outcome.dropped_lines) == ((), ())
    assert sum(len(call.tokens) for call in rollout.calls) == sum(sum(length(*level)) for level in levels)
    assert rollout.sequential_tokens == sum(max(length(*level)) for level in levels)
    assert all(len(call.path) == 2 for call in rollout.calls)


def test_breadth_is_how_many_states_a_level_keeps():
    rollout, asked = run(breadth=1)
    assert rollout.result.answer == ANSWER
    assert STATE.format("4, 5") not in asked
    assert rollout.result.num_children == 6


def test_verdicts_on_a_state_are_asked_for_as_often_as_told_and_summed():
    rollout, asked = run(value_samples=3)
    assert asked.count("24:[4, 6]\n") == asked.count("24:[24]\n") == 3
    assert rollout.result.num_children == 3 + 3 * 5
    # Two states of one verdict each: the sum of likely and sure is above that of sure and impossible.
    script = Prompted()
    answers = {"24:[4, 5]\n": ["sure\n", "likely\n"], "24:[4, 6]\n": ["sure\n", "impossible\n"]}

    def complete(path, tokens):
        texts = answers.get(TOKENIZER.decode(tokens))
        return [*TOKENIZER.encode(texts.pop(0)), TOKENIZER.eos_id] if texts else script(path, tokens)

    asked = settings(tree_of_thoughts=dataclasses.replace(LAPTOP.tree_of_thoughts, breadth=1, value_samples=2))
    (rollout,) = ScriptedEngine(complete).run([(RolloutKey(0, 0), tree_of_thoughts(PROBLEM, asked))])
    assert STATE.format("4, 5") in script.asked
    assert STATE.format("4, 6") not in script.asked
    assert rollout.result.status == "no_solution"


def test_depth_first_goes_on_from_the_best_state_and_ends_at_the_first_leaf():
    rollout, asked = run(search="depth_first")
    assert rollout.result.answer == ANSWER
    assert asked == [
        STATE.format("2, 3, 4"),
        "24:[4, 5]\n",
        "24:[4, 6]\n",
        STATE.format("4, 6"),
        "24:[10]\n",
        "24:[24]\n",
    ]


def test_depth_first_prunes_what_is_not_above_the_threshold_and_backtracks():
    misjudged = {"24:[4, 5]\n": "sure\n", "24:[4, 6]\n": "likely\n"}
    rollout, asked = run(misjudged, search="depth_first", threshold=0.5)
    assert rollout.result.answer == ANSWER
    assert asked.index(STATE.format("4, 5")) < asked.index(STATE.format("4, 6"))
    rollout, asked = run(misjudged, search="depth_first", threshold=1.0)
    assert (rollout.result.status, rollout.result.answer) == ("no_solution", None)
    assert STATE.format("4, 6") not in asked
    # Below every value nothing is pruned: the first leaf is taken, which here misses the target.
    assert run(misjudged, search="depth_first", threshold=0.0)[0].result.status == "no_solution"


def test_lines_and_verdicts_that_are_amiss_are_counted_and_dropped():
    first = STATE.format("2, 3, 4")
    texts = {
        first: TEXTS[first] * 2 + "Exploring Operation: 2*3=6, Resulting Numbers: [6]\n24\n2*3=",
        "24:[4, 5]\n": "20,24\n",
    }
    outcome = run(texts)[0].result
    assert outcome.answer == ANSWER
    amiss = ("repeated_line", "repeated_line", "wrong_count", "malformed_line", "unfinished_line", "no_verdict")
    assert outcome.dropped_lines == amiss


def test_a_proposer_that_proposes_nothing_is_malformed():
    outcome = run({STATE.format("2, 3, 4"): "24\n"})[0].result
    assert (outcome.status, outcome.reason, outcome.num_children) == ("malformed", "no_proposals", 1)
    assert outcome.dropped_lines == ("malformed_line",)


def test_wrong_arithmetic_is_the_verifiers_to_find():
    wrong = {STATE.format("4, 5"): "Exploring Operation: 4*5=24, Resulting Numbers: [24]\n", "24:[4, 5]\n": "sure\n"}
    outcome = run(wrong)[0].result
    assert outcome.status == "answered"
    assert verify(outcome.answer, PROBLEM).reason == "wrong_arithmetic"


@pytest.mark.parametrize(("cap", "status"), [(8, "answered"), (7, "truncated")])
def test_no_spawn_passes_the_cap_on_children(cap, status):
    outcome = run(max_total_children=cap)[0].result
    assert (outcome.status, outcome.reason) == (status, "" if status == "answered" else "rollout_children")
    assert outcome.num_children <= cap


def test_a_child_that_is_cut_off_is_counted_and_its_whole_lines_serve():
    room = length(STATE.format("2, 3, 4"))[0] - 1  # all but EOS
    outcome = run(engine=lambda script: ScriptedEngine(script, max_steps=room))[0].result
    assert (outcome.answer, outcome.child_reasons) == (ANSWER, ("max_steps",))


def test_what_demonstrations_write_solves_every_problem():
    """States that a demonstration did not go on from get no proposals here."""
    for demo in demonstrations(SMALL, "tree_of_thoughts", 20):
        replay = Replay([demo])

        def complete(path, tokens, replay=replay):
            return replay(path, tokens) if tuple(tokens) in replay.script else [TOKENIZER.eos_id]

        options = dataclasses.replace(LAPTOP.tree_of_thoughts, breadth=100)
        program = tree_of_thoughts(demo.problem, settings(tree_of_thoughts=options))
        (rollout,) = ScriptedEngine(complete).run([(RolloutKey(0, 0), program)])
        assert verify(rollout.result.answer, demo.problem).correct
        assert rollout.result.child_reasons == ()
        assert set(rollout.result.dropped_lines) <= {"no_verdict"}
