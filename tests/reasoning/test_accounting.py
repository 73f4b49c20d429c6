"""Every program's accounts, counted by hand: what is written, computed and attended to, and the longest chain.

Lengths of texts are asserted once, as numbers; what each case expects is made of these numbers alone. A thread of n
tokens that is decoded has n - 1 of them computed by prefill; its last is decode's first input. So a thread that comes
to hold n tokens without ever being cut back has attended to keys(1, n - 1).
"""

import dataclasses

import pytest

from apr_jax.engine.threads import RolloutKey
from apr_jax.reasoning import METHODS
from apr_jax.reasoning.adaptive import adaptive
from apr_jax.reasoning.direct import direct
from apr_jax.reasoning.hogwild import hogwild
from apr_jax.reasoning.pasta import pasta
from apr_jax.reasoning.programs import make_program
from apr_jax.reasoning.serial import serial
from apr_jax.reasoning.tree_of_thoughts import tree_of_thoughts
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.adaptive import ADAPTIVE, render_spawn
from apr_jax.tasks.countdown.hogwild import HOGWILD, LEAVE
from apr_jax.tasks.countdown.pasta import SYNC
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.serial import SERIAL
from apr_jax.tasks.dialect import ChildResult
from tests.reasoning.accounting import Counts, check, keys, lengths
from tests.reasoning.fixtures import TOKENIZER, settings
from tests.reasoning.scripted_engine import ScriptedEngine

PROBLEM = Problem((2, 3, 4), 24)
EXPLORED = (
    "Exploring Operation: 3+2=5, Resulting Numbers: [4, 5]\n"
    "Generated Node #0,0: 24:[4, 5] Operation: 3+2=5\n"
    "Exploring Operation: 2*3=6, Resulting Numbers: [4, 6]\n"
    "Generated Node #0,1: 24:[4, 6] Operation: 2*3=6\n"
)
STATE_5_4 = "Moving to Node #0,0\nCurrent State: 24:[4, 5], Operations: ['3+2=5']\n"
STATE_6_4 = "Moving to Node #0,1\nCurrent State: 24:[4, 6], Operations: ['2*3=6']\n"
LOSES = "Exploring Operation: 4*5=20, Resulting Numbers: [20]\n20,24 unequal: No Solution\n"
LAST = "Exploring Operation: 4*6=24, Resulting Numbers: [24]\n24,24 equal: Goal Reached\n"
WINS = LAST + STATE_6_4 + LAST
SPAWN = EXPLORED + render_spawn(["0,0", "0,1"])
REPLAY = (
    ADAPTIVE.prompt(PROBLEM)
    + "Exploring Operation: 2*3=6, Resulting Numbers: [4, 6]\nGenerated Node #0,1: 24:[4, 6] Operation: 2*3=6\n"
    + STATE_6_4
    + LAST
)
JOINED = [ChildResult("0,0", None), ChildResult("0,1", (STATE_6_4 + LAST).strip())]


def test_lengths_that_all_counts_are_made_of():
    assert lengths(SERIAL.prompt(PROBLEM), ADAPTIVE.prompt(PROBLEM), "Token Budget: 512 ") == [9, 11, 5]
    assert lengths(STATE_5_4, STATE_6_4) == [16, 16]  # a child's prompt
    assert lengths(EXPLORED, SPAWN, LOSES, WINS, REPLAY) == [52, 64, 13, 42, 66]
    assert lengths(trace.NO_SOLUTION, ADAPTIVE.render_join(JOINED)) == [1, 41]


def test_serial():
    """BOS and 9 tokens, then 13 + 1 and EOS."""
    expected = Counts(generated=15, sequential=15, peak_context=25, threads=1, prefilled=9, attended=keys(1, 24))
    check(lambda: serial(PROBLEM, settings()), {(): [LOSES + trace.NO_SOLUTION]}, expected)


def test_serial_told_its_budget():
    """Five tokens more in the prompt."""
    expected = Counts(generated=15, sequential=15, peak_context=30, threads=1, prefilled=14, attended=keys(1, 29))
    check(lambda: serial(PROBLEM, settings(budget=512)), {(): [LOSES + trace.NO_SOLUTION]}, expected)


def test_direct():
    """BOS and 11 tokens, then a path of 13 and EOS."""
    expected = Counts(generated=14, sequential=14, peak_context=26, threads=1, prefilled=11, attended=keys(1, 25))
    check(lambda: direct(PROBLEM, settings()), {(): [LAST]}, expected)


@pytest.mark.parametrize("name", ["best", "cons", "pass"])
def test_samples_share_one_prompt(name):
    """Its 9 tokens are prefilled once, for three forks of it that write 15, 2 and 28 tokens."""
    expected = Counts(
        generated=15 + 2 + 28,
        sequential=28,
        peak_context=10 + 28,
        threads=3,
        prefilled=9,
        attended=keys(1, 9) + keys(10, 24) + keys(10, 11) + keys(10, 37),
    )
    texts = {(0, 0): [LOSES + trace.NO_SOLUTION], (0, 1): [trace.NO_SOLUTION], (0, 2): [LOSES * 2 + trace.NO_SOLUTION]}
    check(lambda: make_program(f"{name}@3:serial", PROBLEM, settings()), texts, expected)


def test_samples_of_adaptive():
    """Twice what one costs, but for the prompt; side by side, so that the chain is one sample's."""
    texts = {(): [SPAWN, REPLAY], (0, 0): [LOSES + trace.NO_SOLUTION], (0, 1): [WINS]}
    expected = Counts(
        generated=2 * 189,
        sequential=174,
        peak_context=172,
        threads=6,
        prefilled=11 + 2 * (16 + 16 + 41),
        attended=keys(1, 11) + 2 * (keys(12, 75) + keys(1, 31) + keys(1, 59) + keys(64, 171)),
    )
    twice = {(0, sample, *path): calls for sample in range(2) for path, calls in texts.items()}
    rollout = check(lambda: make_program("cons@2:adaptive", PROBLEM, settings()), twice, expected)
    assert rollout.result.num_children == 4


@pytest.mark.parametrize("max_tokens", [11, 20, 24])
def test_a_thread_holds_no_more_than_it_may(max_tokens):
    """The same texts under a limit at decoding: 25 tokens would be needed."""
    expected = Counts(
        generated=max_tokens - 10,
        sequential=max_tokens - 10,
        peak_context=max_tokens,
        threads=1,
        prefilled=9,
        attended=keys(1, max_tokens - 1),
    )
    texts = {(): [LOSES + trace.NO_SOLUTION]}
    rollout = check(lambda: make_program("serial", PROBLEM, settings(max_tokens=max_tokens)), texts, expected)
    assert (rollout.result.status, rollout.result.reason) == ("truncated", "context_full")


@pytest.mark.parametrize("method", [*sorted(METHODS), "cons@2:adaptive", "pass@2:hogwild"])
def test_no_program_lets_a_thread_hold_more(method):
    """Every thread writes and writes. Workers on a shared cache may see no more, so that rounding costs them a few."""
    script = TOKENIZER.encode(trace.NO_SOLUTION) * 400 + [TOKENIZER.eos_id]
    for max_tokens in (64, 65):
        program = make_program(method, PROBLEM, settings(max_tokens=max_tokens))
        (rollout,) = ScriptedEngine(lambda path, tokens: script).run([(RolloutKey(0, 0), program)])
        assert max_tokens - 3 * ("hogwild" in method) <= rollout.peak_context <= max_tokens
        assert rollout.result.answer is None


def test_children_and_samples_are_held_to_it_too():
    """At 80 tokens the parent's 12 + 64 fit and the winner's 17 + 43; what the loser writes and the join do not."""
    texts = {(0, 0): [SPAWN, REPLAY], (0, 0, 0, 0): [LOSES * 9 + trace.NO_SOLUTION], (0, 0, 0, 1): [WINS]}
    expected = Counts(
        generated=64 + 63 + 43,
        sequential=64 + 63,
        peak_context=80,
        threads=3,
        prefilled=11 + 16 + 16,
        attended=keys(1, 75) + keys(1, 79) + keys(1, 59),
    )
    rollout = check(lambda: make_program("best@1:adaptive", PROBLEM, settings(max_tokens=80)), texts, expected)
    assert (rollout.result.reason, rollout.result.child_reasons) == ("context_full", ("context_full",))


def test_adaptive():
    """The parent holds 12 + 64, goes back to its 12 + 52, is given 41 and writes 66 and EOS. Children: 17 and more."""
    expected = Counts(
        generated=64 + 14 + 1 + 43 + 67,
        sequential=64 + 43 + 67,
        peak_context=12 + 52 + 41 + 67,
        threads=3,
        prefilled=11 + 16 + 16 + 41,
        attended=keys(1, 75) + keys(1, 31) + keys(1, 59) + keys(64, 171),
    )
    texts = {(): [SPAWN, REPLAY], (0, 0): [LOSES + trace.NO_SOLUTION], (0, 1): [WINS]}
    rollout = check(lambda: adaptive(PROBLEM, settings()), texts, expected)
    assert (rollout.result.status, rollout.result.num_children) == ("answered", 2)


def test_adaptive_cancels_at_the_first_success():
    """The loser would write on, and is cut off where the winner ended, after 43 tokens."""
    expected = Counts(
        generated=64 + 43 + 43 + 67, sequential=64 + 43 + 67, peak_context=172, threads=3, prefilled=84, attended=0
    )
    texts = {(): [SPAWN, REPLAY], (0, 0): [LOSES * 9 + trace.NO_SOLUTION], (0, 1): [WINS]}
    rollout = check(lambda: adaptive(PROBLEM, settings(cancel_on_success=True)), texts, expected, cancels=True)
    assert rollout.work.decoded >= rollout.generated_tokens, "what was written past the cutoff was computed"


def test_adaptive_spawns_within_spawns():
    """Three levels, one child each; the chain is all that is written."""
    problem = Problem((1, 2, 3, 4), 24)
    root = (
        "Exploring Operation: 2*1=2, Resulting Numbers: [3, 4, 2]\nGenerated Node #0,0: 24:[3, 4, 2] Operation: 2*1=2\n"
    )
    child = (
        "Exploring Operation: 3*4=12, Resulting Numbers: [2, 12]\nGenerated Node #0,0,0: 24:[2, 12] Operation: 3*4=12\n"
    )
    child_prompt = "Moving to Node #0,0\nCurrent State: 24:[3, 4, 2], Operations: ['2*1=2']\n"
    leaf_prompt = "Moving to Node #0,0,0\nCurrent State: 24:[2, 12], Operations: ['2*1=2', '3*4=12']\n"
    joins = [ADAPTIVE.render_join([ChildResult(node, None)], level) for node, level in (("0,0", 1), ("0,0,0", 2))]
    assert lengths(ADAPTIVE.prompt(problem), child_prompt, leaf_prompt) == [13, 18, 23]
    assert lengths(root, child, *joins) == [30, 27, 7, 10]
    spawns = [render_spawn(["0,0"]), render_spawn(["0,0,0"], level=2)]
    assert lengths(*spawns) == [7, 10]
    expected = Counts(
        generated=30 + 7 + 27 + 10 + 2 + 2 + 2,
        sequential=30 + 7 + 27 + 10 + 2 + 2 + 2,
        peak_context=19 + 27 + 10 + 2,
        threads=3,
        prefilled=13 + 18 + 23 + 10 + 7,
        attended=keys(1, 14 + 37 - 1)
        + keys(1, 19 + 37 - 1)
        + keys(1, 24 + 2 - 1)
        + keys(19 + 27, 19 + 27 + 10 + 2 - 1)
        + keys(14 + 30, 14 + 30 + 7 + 2 - 1),
    )
    texts = {
        (): [root + spawns[0], trace.NO_SOLUTION],
        (0, 0): [child + spawns[1], trace.NO_SOLUTION],
        (0, 0, 0, 0): [trace.NO_SOLUTION],
    }
    check(lambda: adaptive(problem, settings(max_depth=2)), texts, expected)


THOUGHTS = {
    # a proposer of the root: 9 tokens are its prompt's, it writes 22
    (0, 0): (
        "Exploring Operation: 2+3=5, Resulting Numbers: [4, 5]\nExploring Operation: 2*3=6, Resulting Numbers: [4, 6]\n"
    ),
    # evaluators: 6, 19
    (1, 0): "4+5=9\n5-4=1\n4*5=20\nimpossible\n",
    (1, 1): "4+6=10\n6-4=2\n4*6=24\nsure\n",
    # proposers, the better state's first: 7; 18 and 9
    (2, 0): (
        "Exploring Operation: 4+6=10, Resulting Numbers: [10]\nExploring Operation: 4*6=24, Resulting Numbers: [24]\n"
    ),
    (2, 1): "Exploring Operation: 4*5=20, Resulting Numbers: [20]\n",
    # evaluators of one number: 4, 1
    (3, 0): "impossible\n",
    (3, 1): "sure\n",
    (3, 2): "impossible\n",
}


def test_tree_of_thoughts():
    """Each thought is a thread of its own; those of a level are one link of the chain. The root holds nothing."""
    assert lengths(*THOUGHTS.values()) == [22, 19, 19, 18, 9, 1, 1, 1]
    expected = Counts(
        generated=23 + 2 * 20 + 19 + 10 + 3 * 2,
        sequential=23 + 20 + 19 + 2,
        peak_context=10 + 23,
        threads=8,
        prefilled=9 + 2 * 6 + 2 * 7 + 3 * 4,
        attended=keys(1, 32) + 2 * keys(1, 26) + keys(1, 26) + keys(1, 17) + 3 * keys(1, 6),
    )
    texts = {path: [text] for path, text in THOUGHTS.items()}
    rollout = check(lambda: tree_of_thoughts(PROBLEM, settings()), texts, expected)
    assert (rollout.result.status, rollout.result.num_children) == ("answered", 8)


def test_tree_of_thoughts_depth_first():
    """Only the better state is gone on from: the worse one's proposer and the leaf below it are never asked."""
    expected = Counts(
        generated=23 + 2 * 20 + 19 + 2 * 2,
        sequential=23 + 20 + 19 + 2,
        peak_context=10 + 23,
        threads=6,
        prefilled=9 + 2 * 6 + 7 + 2 * 4,
        attended=keys(1, 32) + 2 * keys(1, 26) + keys(1, 26) + 2 * keys(1, 6),
    )
    texts = {path: [text] for path, text in THOUGHTS.items() if path not in ((2, 1), (3, 2))}
    options = dataclasses.replace(settings().tree_of_thoughts, search="depth_first")
    rollout = check(lambda: tree_of_thoughts(PROBLEM, settings(tree_of_thoughts=options)), texts, expected)
    assert rollout.result.status == "answered"


def test_pasta():
    """The parent goes on from 12 + 59 with 30 while its child, 17, writes 43; all 58 of that come back between 7 more.

    It is never cut back, so it attends to each of its keys once; only the join is prefilled beside the prompts.
    """
    spawn = EXPLORED + render_spawn(["0,1"])
    own = STATE_5_4 + LOSES + SYNC
    assert lengths(spawn, own, trace.goal_line(24)) == [59, 30, 4]
    expected = Counts(
        generated=59 + 30 + 43 + 71,
        sequential=59 + 43 + 71,
        peak_context=12 + 59 + 30 + 65 + 71,
        threads=2,
        prefilled=11 + 16 + 65,
        attended=keys(1, 12 + 59 + 30 + 65 + 71 - 1) + keys(1, 17 + 43 - 1),
    )
    texts = {(): [spawn, own, trace.goal_line(24) + REPLAY], (0, 0): [WINS]}
    rollout = check(lambda: pasta(PROBLEM, settings()), texts, expected)
    assert (rollout.result.status, rollout.result.num_children) == ("answered", 1)


def test_pasta_whose_parent_takes_longer_than_its_child():
    """A child that gives up at once costs no time: the chain is the parent's alone."""
    spawn = EXPLORED + render_spawn(["0,1"])
    own = STATE_5_4 + LOSES + SYNC
    expected = Counts(
        generated=59 + 30 + 2 + 2,
        sequential=59 + 30 + 2,
        peak_context=12 + 59 + 30 + 24 + 2,
        threads=2,
        prefilled=11 + 16 + 24,
        attended=keys(1, 12 + 59 + 30 + 24 + 2 - 1) + keys(1, 17 + 2 - 1),
    )
    texts = {(): [spawn, own, trace.NO_SOLUTION], (0, 0): [trace.NO_SOLUTION]}
    assert check(lambda: pasta(PROBLEM, settings()), texts, expected).result.status == "no_solution"


def test_hogwild():
    """Two workers hold 12 + 4 each. One writes 16 and EOS, the other 63 and EOS; their steps are taken together.

    The first draws at times 0 to 16 and sees 4 + t tokens of the other; so does the other of it, which then draws 47
    times more and sees all 4 + 16 that the first has read.
    """
    texts = [LOSES + LEAVE, LAST + ADAPTIVE.prompt(PROBLEM) + LOSES + LOSES + LAST]
    assert lengths(HOGWILD.header(0), HOGWILD.header(1), *texts) == [4, 4, 16, 63]
    across = 2 * sum(4 + time for time in range(17)) + (64 - 17) * (4 + 16)
    expected = Counts(
        generated=17 + 64,
        sequential=64,
        peak_context=12 + 4 + 17 + 4 + 64,
        threads=2,
        prefilled=15 + 15,
        attended=keys(1, 15 + 17) + keys(1, 15 + 64) + across,
    )
    script = {(0, number): [text] for number, text in enumerate(texts)}
    rollout = check(lambda: hogwild(PROBLEM, settings()), script, expected, workers=2)
    assert (rollout.result.status, rollout.result.num_children) == ("answered", 2)
