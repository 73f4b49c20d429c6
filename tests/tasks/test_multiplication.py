"""Multiplication: numerals, verifier, both dialects and their demonstrations, and training from data to report."""

import json
import math
import random

import pytest

from apr_jax.config import ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.data.demonstrations import load_split
from apr_jax.data.tokenizer import load_tokenizer
from apr_jax.engine.threads import RolloutKey
from apr_jax.reasoning.adaptive import adaptive
from apr_jax.reasoning.serial import serial
from apr_jax.tasks.dialect import CALL_BEGIN, CALL_END, ChildResult, Malformed, SpawnCall, demonstrated_tokens
from apr_jax.tasks.generation import demonstrate, generate_problems
from apr_jax.tasks.multiplication import numerals
from apr_jax.tasks.multiplication.adaptive import ADAPTIVE, asked_value, continuation
from apr_jax.tasks.multiplication.config import MultiplicationConfig
from apr_jax.tasks.multiplication.serial import SERIAL
from apr_jax.tasks.multiplication.task import MULTIPLICATION
from apr_jax.tasks.multiplication.vocabulary import TOKENIZER as FILE
from apr_jax.tasks.multiplication.vocabulary import tokenizer_json
from apr_jax.train.run import train
from configs.multiplication import get_config
from tests.reasoning.fixtures import call_tokens, settings
from tests.reasoning.scripted_engine import ScriptedEngine

TOKENIZER = load_tokenizer(str(FILE))
SECTION = MultiplicationConfig(name="multiplication", min_factors=5, max_factors=8, round_share=0.0)
SETTINGS = settings(task=MULTIPLICATION, tokenizer=TOKENIZER, max_depth=3, max_children=4, max_spawns=2)
EDGES = [
    (1000,) * 8,
    (0,) * 5,
    (1,) * 6,
    (999,) * 8,
    (1000, 999, 1000, 999, 1000),
    (0, 1000, 1, 10, 100, 999, 1000, 1000),
    (1000,) * 7 + (999,),
    (2, 5),
    (1000, 1000),
    (7, 8, 9),
    (1000,) * 3,
]
PROGRAMS = {"adaptive": adaptive, "serial": serial}


def drawn(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        round_share = rng.choice((0.0, 0.3))
        yield tuple(
            rng.choice((0, 1, 10, 100, 1000)) if rng.random() < round_share else rng.randint(0, 1000)
            for _ in range(rng.randint(5, 8))
        )


def solution(problem, method):
    return demonstrate(problem, random.Random(0), SECTION, method, False)


def run(problem, method, complete):
    (rollout,) = ScriptedEngine(complete).run([(RolloutKey(0, 0), PROGRAMS[method](problem, SETTINGS))])
    return rollout


def replay(demo):
    script = dict(call_tokens(call, TOKENIZER) for call in demo.calls)
    return run(demo.problem, demo.method, lambda path, tokens: script[tuple(tokens)])


def writer(texts):
    """Play texts, each what the calls of the thread at a path write, one after the other."""
    left = {path: list(calls) for path, calls in texts.items()}

    def write(path, tokens):
        text = left[path].pop(0)
        return [*TOKENIZER.encode(text), *([] if text.endswith(CALL_END) else [TOKENIZER.eos_id])]

    return write


@pytest.mark.parametrize("method", PROGRAMS)
def test_demonstrations_are_right_and_each_of_their_steps_is(method):
    steps = 0
    for problem in [*EDGES, *drawn(500)]:
        demo = solution(problem, method)
        assert demo.correct, problem
        assert demo.answer == str(math.prod(problem))
        for call in demo.calls:
            written, right = MULTIPLICATION.count_operations(call.completion, call.context)
            assert written == right
            steps += written
            if not call.ends_in_spawn and method == "adaptive":
                assert ADAPTIVE.child_result(call.context, call.completion, problem) == "solved"
    assert steps > 50_000


@pytest.mark.parametrize("method", PROGRAMS)
def test_the_program_rebuilds_demonstrations_token_by_token(method):
    for problem in [*EDGES, *drawn(30, seed=1)]:
        demo = solution(problem, method)
        rollout = replay(demo)
        assert MULTIPLICATION.verify(rollout.result.answer, problem).correct
        counted = demonstrated_tokens(MULTIPLICATION.dialects[method], demo, lambda text: len(TOKENIZER.encode(text)))
        assert counted[:2] == (rollout.sequential_tokens, rollout.generated_tokens)


def test_the_longest_thread_is_less_than_half_of_the_chain():
    longest = dict.fromkeys(PROGRAMS, 0)
    for problem in drawn(40, seed=2):
        for method in PROGRAMS:
            demo = solution(problem, method)
            count = demonstrated_tokens(MULTIPLICATION.dialects[method], demo, lambda text: len(TOKENIZER.encode(text)))
            longest[method] += count.sequential
            lengths = [sum(map(len, call_tokens(call, TOKENIZER))) for call in demo.calls]
            assert max(lengths) <= get_config(method).model.max_seq_len
    assert longest["serial"] > 2.5 * longest["adaptive"]


def test_numbers_are_written_as_the_docs_say():
    assert numerals.write_number(numerals.digits_of(742, 3)) == "a2b4c7"
    assert numerals.digits_of(1000, 3) == [0, 0, 10]
    assert numerals.write_steps(numerals.take_steps(numerals.row_sums([2, 4, 7], 8))) == "a^0a6b^1b3c^3c9d^5d5"
    assert ADAPTIVE.prompt((742, 1000, 0)) == "A742BX00C000=\n"
    assert SERIAL.prompt((742, 1000, 0)) == "a^2b^4c^7d^0e^0f^Xg^0h^0i^0=\n"
    calls = solution((742, 103, 15), "adaptive").calls
    assert calls[0].completion == f"{CALL_BEGIN}AB\nCC\n{CALL_END}"
    assert calls[1].context.endswith("<Sub Searches>\na6b2c4d6e7f0*a5b1c0=\n<End Sub Searches>\n")
    assert calls[1].completion == f"{CALL_BEGIN}a5\nb1\nc0\n{CALL_END}"
    assert calls[5].context + calls[5].completion == "3*a2b4c7=\na^0a6b^0b2c^1c2d^2d2\n"
    (call,) = solution((742, 103), "serial").calls
    assert call.completion.startswith("a2b4c7\nBd^3e^0f^1a*3b*0c*1:2a^06b^00c^000a64a^02b^00c^000b2")
    assert SERIAL.prompt((1,) * len(numerals.NAMES)).endswith("v^1w^0x^0=\n")


@pytest.mark.parametrize("value", [0, 1, 9, 10, 999, 1000, 10**6, 999**2])
def test_digits_read_back(value):
    digits = numerals.digits_of(value, 6)
    assert numerals.value_of(digits) == value
    assert numerals.read_number(numerals.write_number(digits)) == digits


@pytest.mark.parametrize("text", ["b2", "a2c4", "a2a4", "".join(f"{place}0" for place in numerals.PLACES) + "a0"])
def test_places_out_of_order_are_no_number(text):
    assert numerals.read_number(text) is None


def test_a_step_is_judged_by_what_stands_before_it():
    sums = numerals.row_sums([2, 4, 7], 8)
    steps = numerals.take_steps(sums)
    assert numerals.count_right(sums, steps) == 4
    wrong_digit, wrong_carry = [(0, 7), *steps[1:]], [steps[0], (2, 4), *steps[2:]]
    assert numerals.count_right(sums, wrong_digit) == 3
    assert numerals.count_right(sums, wrong_carry) == 3
    assert MULTIPLICATION.count_operations("a^0a6b^1b3c^3c9d^5d4\n", "8*a2b4c7=\n") == (4, 3)
    assert MULTIPLICATION.count_operations("no product\n") == (0, 0)


def test_bare_sums_are_written_as_in_threads():
    rng = random.Random(0)
    for _ in range(200):
        asked, steps = MULTIPLICATION.draw_fact(rng, SECTION)
        assert continuation(f"a2*a3=\n{asked}") == f"{steps}\n"
        assert MULTIPLICATION.count_operations(f"{steps}\n", asked) == (len(steps) // 5, len(steps) // 5)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("1146390", "correct"),
        ("0001146390", "correct"),
        ("1146391", "wrong_value"),
        ("-1146390", "no_number"),
        ("742*103*15", "no_number"),
        ("\u0661", "no_number"),
        ("9" * 5_000, "no_number"),
        ("", "no_number"),
        (None, "no_answer"),
    ],
)
def test_answers_are_judged_by_exact_integers(answer, reason):
    assert MULTIPLICATION.verify(answer, (742, 103, 15)).reason == reason


@pytest.mark.parametrize(
    ("prompt", "spawn", "reason"),
    [
        ("A742B103C015=\n", "", "malformed_line"),
        ("A742B103C015=\n", "AB\nC", "malformed_line"),
        ("A742B103C015=\n", "AB\nAC\n", "duplicate_child"),
        ("A742B103C015=\n", "AC\n", "unknown_part"),
        ("A742B103C015=\n", "BD\n", "unknown_part"),
        ("A742B103C015=\n", "a5\n", "unknown_part"),
        ("a2b4c7*a1b2c3=\n", "AB\n", "unknown_part"),
        ("a2b4c7*a1b2c3=\n", "a1b2\n", "unknown_part"),
        ("a2b4c7*a1b2c3=\n", "a1c2d3\n", "unknown_part"),
        ("a2b4c7*a1b2c3=\n", "x1\n", "unknown_part"),
        ("a2c4*a1b2c3=\n", "a1\n", "unknown_part"),
        ("5*a2b4c7=\n", "a1\n", "nothing_to_split"),
    ],
)
def test_malformed_spawns_have_a_reason(prompt, spawn, reason):
    assert ADAPTIVE.read_spawn(f"{prompt}{CALL_BEGIN}{spawn}{CALL_END}") == Malformed(reason)


def test_a_spawn_without_its_begin_is_malformed():
    assert ADAPTIVE.read_spawn(f"A742B103C015=\n{CALL_END}") == Malformed("no_call_begin")


@pytest.mark.parametrize("method", PROGRAMS)
@pytest.mark.parametrize("written", ["\n", "a^0a0", "0b0\n", "B103:\n", "*=\n"])
def test_an_unfinished_answer_is_data(method, written):
    result = run((7, 8, 9), method, writer({(): [written]})).result
    assert (result.answer, result.status, result.reason) == (None, "malformed", "unfinished")


def test_columns_leave_zeros_for_a_child_that_failed():
    call = ADAPTIVE.read_spawn(f"a2b4c7*a5b1c0=\n{CALL_BEGIN}a5\nb1\n{CALL_END}")
    assert isinstance(call, SpawnCall)
    assert call.contexts == ("5*a2b4c7=\n", "1*a2b4c7=\n")
    row = ADAPTIVE.read_child("5*a2b4c7=\na^0a0b^1b1c^1c7d^3d3\n", "a5")
    assert row == ChildResult("a5", "a0b1c7d3")
    assert ADAPTIVE.read_child("1*a2b4c7=\nb2\n", "b1") == Malformed("unfinished")
    assert ADAPTIVE.render_join([row, ChildResult("b1", "a2b4c7d0")], None) == (
        "<Sub Searches>\n0a01b27c43d70e0\n<End Sub Searches>\n"
    )
    assert ADAPTIVE.render_join([row, ChildResult("b1", None)], None) == (
        "<Sub Searches>\n0a01b07c03d0\n<End Sub Searches>\n"
    )


def test_asked_values():
    assert asked_value("A742BX00=\n") == 742_000
    assert asked_value("a2b4c7*a3=\n") == 742 * 3
    assert asked_value("X*a2b4c7=\n") == 7_420
    assert asked_value("27:[3, 4]\n") is None
    assert continuation("A742B103C015=\n").startswith(CALL_BEGIN)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("742*103*15", (742, 103, 15)),
        ("742 103  15", (742, 103, 15)),
        ({"title": "0 * 1000"}, (0, 1000)),
        ([7, 8], (7, 8)),
        ((7, 8), (7, 8)),
    ],
)
def test_problems_are_read(given, problem):
    assert MULTIPLICATION.read_problem(given) == problem
    assert MULTIPLICATION.read_problem(MULTIPLICATION.describe(problem)) == problem


@pytest.mark.parametrize(
    "given", ["", "742", "742*1001", "7*8*", "7**8", "-7*8", "1*" * 8 + "1", "7*x", None, 5, {}, [7, True], [7, -1]]
)
def test_what_is_no_problem_is_refused(given):
    with pytest.raises(ValueError, match=r"is no product of 2 to 8 integers|is not in 0..1000"):
        MULTIPLICATION.read_problem(given)


def test_the_tokenizer_file_is_the_vocabulary():
    assert json.loads(FILE.read_text()) == tokenizer_json()
    for problem in EDGES:
        for method in PROGRAMS:
            for call in solution(problem, method).calls:
                text = call.context + call.completion
                assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert all(TOKENIZER.mark_id(mark) is not None for mark in MULTIPLICATION.marks)
    with pytest.raises(ValueError, match=r"does not give back|cannot write"):
        TOKENIZER.encode("what is 7*8?\n")


def tiny_config(folder):
    values = get_config("adaptive.rl.quick")
    values.model.update(embed_dim=48, mlp_dim=64, head_dim=32)
    values.mesh.data = 1
    values.data.update(directory=str(folder), num_workers=1)
    values.engine.pages = 256
    return from_config_dict(values)


def test_splits_share_no_problem_and_are_reproducible(tmp_path):
    config = tiny_config(tmp_path)
    splits = [list(generate_problems(config, split)) for split in ("train", "validation", "test")]
    keys = [{MULTIPLICATION.key(problem) for problem in split} for split in splits]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert splits == [list(generate_problems(config, split)) for split in ("train", "validation", "test")]
    assert all(5 <= len(problem) <= 8 and min(problem) >= 0 and max(problem) <= 1000 for problem in splits[0])


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"task\.min_factors=5 is above task\.max_factors=4"):
        MultiplicationConfig(name="multiplication", min_factors=5, max_factors=4, round_share=0.0)
    values = get_config()
    values.rollout.max_depth = 2
    with pytest.raises(ConfigError, match=r"rollout\.max_depth=2: children of products of task\.max_factors=8"):
        from_config_dict(values)
    with pytest.raises(ValueError, match="no such variant; choose one of adaptive, serial"):
        get_config("direct")


@pytest.mark.heavy
def test_the_projects_own_trainer_runs_it_from_data_to_report(tmp_path):
    config = tiny_config(tmp_path / "data")
    summary = train(config, tmp_path / "run")
    assert summary["before"]["num_problems"] == summary["after"]["num_problems"] == 8
    problem = load_split(config, "test")[0].problem
    assert MULTIPLICATION.describe(problem)["title"] in (tmp_path / "run" / "report.html").read_text()
