"""Problems from users' files and command lines: whatever they hold, one line says where and what is wrong."""

import pytest

from apr_jax.config import ConfigError
from apr_jax.evaluation.rollout_sources import ProblemFileError, read_problem_words, read_problems
from apr_jax.tasks import TASKS

LINES = {
    "a number of 5,000 digits": b'{"numbers": [3, 7, %s], "target": 40}' % (b"9" * 5_000),
    "a number of 19 digits": b'{"numbers": [3, 7], "target": 1000000000000000000}',
    "100,000 brackets": b'{"numbers": %s' % (b"[" * 100_000),
    "brackets that close": b'{"title": "%s3+4%s"}' % (b"[" * 5_000, b"]" * 5_000),
    "an infinite number": b'{"numbers": [3, 7], "target": 1e400}',
    "NaN": b'{"numbers": [3, NaN], "target": 4}',
    "True": b'{"numbers": [3, 7, true], "target": 4}',
    "a float": b'{"numbers": [3, 7.0], "target": 4}',
    "a nested list": b'{"numbers": [[3], 7], "target": 4}',
    "an object for a list": b'{"numbers": {"3": 7}, "target": 4}',
    "nothing in it": b'{"numbers": null, "target": null, "title": null}',
    "null": b"null",
    "a number": b"5",
    "not UTF-8": b"\xff\xfe",
    "half a pair": b'{"numbers": [3, 7], "target": "\\ud800", "title": "\\ud800"}',
    "a NUL": b"\0",
    "text": b"27 3 9 18",
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("name", LINES)
def test_a_hostile_line_is_named(tmp_path, task, name):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(LINES[name] + b"\n")
    with pytest.raises(ProblemFileError) as error:
        read_problems(task, path)
    message = str(error.value)
    assert message.startswith(f"{path}, line 1: ")
    assert len(message) < 1_000
    assert "\n" not in message


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize(
    "words",
    [["9" * 5_000, "1", "2"], ["-1", "2", "3"], ["1e5", "2", "3"], ["[" * 100_000], [""], ["\ud800"], ["\u0663"] * 3],
)
def test_hostile_words_are_refused_with_an_example(task, words):
    with pytest.raises(ConfigError, match="is written as") as error:
        read_problem_words(task, words)
    assert len(str(error.value)) < 1_000


def test_a_line_separator_of_unicode_does_not_end_a_line(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"note": "\u2028\u0085", "numbers": [3, 7], "target": 10}\n', encoding="utf-8")
    (problem,) = read_problems(TASKS["countdown"], path)
    assert problem.target == 10
