"""Traces of a user's own: what a line becomes, and every way in which one can be wrong, with its number."""

import json
import random

import pytest

from apr_jax.config import ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.tasks import TASKS
from apr_jax.tasks.generation import draw_splits, generate_split
from apr_jax.tasks.traces import TracedDialect
from configs import traces

SPAWN = "<spawn>\n<thread 1>\nWhat is 2+3?\n</thread>\n<thread 2>\nWhat is 1+1?\n</thread>\n</spawn>\n"
CALLS = [SPAWN, "5 and 2\n<result>\n7\n</result>", "<result>\n5\n</result>\n", "<result>\n2\n</result>\n"]
LINE = {"prompt": "What is 2+3+1+1?", "answer": "7", "calls": CALLS}
PLAIN = [{"prompt": f"What is {n}+1?", "answer": str(n + 1)} for n in range(40)]


def config_of(folder, lines, method="adaptive", **task):
    path = folder / "mine.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    config = traces.get_config()
    config.model.family = "llama"
    config.task = dict(name=f"traces:{path}", traces="") | task
    config.data.update(method=method, num_train=30, num_validation=3, num_test=3, num_test_unseen_targets=3)
    config.data.num_workers = 1
    config.evaluation.num_problems = config.grpo.validation_problems = 3
    return from_config_dict(config)


def test_calls_become_what_the_engine_would_have_made(tmp_path):
    config = config_of(tmp_path, [LINE])
    dialect = TASKS["traces"].dialect("adaptive", TracedDialect)
    calls = dialect.read_calls((CALLS[0], CALLS[1] + "\n", *CALLS[2:]), "What is 2+3+1+1?\n")
    join = "<join>\n<thread 1>\n5\n</thread>\n<thread 2>\n2\n</thread>\n</join>\n"
    assert [(call.context, call.depth, call.ends_in_spawn) for call in calls] == [
        ("What is 2+3+1+1?\n", 0, True),
        (f"What is 2+3+1+1?\n{join}", 0, False),
        ("What is 2+3?\n", 1, False),
        ("What is 1+1?\n", 1, False),
    ]
    problem = TASKS["traces"].sampler(config, None)(random.Random(0))
    assert TASKS["traces"].read_problem(problem) == problem
    assert TASKS["traces"].verify(" 7 ", problem).correct
    assert TASKS["traces"].verify("8", problem).reason == "wrong_answer"


def test_splits_are_disjoint_and_demonstrations_are_right(tmp_path):
    config = config_of(tmp_path, [*PLAIN, "", LINE])
    splits = draw_splits(config)
    held_out = [problem.prompt for problems in splits.held_out.values() for problem in problems]
    assert len(set(held_out)) == 9
    demonstrations = list(generate_split(config, "train"))
    assert all(each.correct for each in demonstrations)
    assert not {each.problem.prompt for each in demonstrations} & set(held_out)
    assert list(generate_split(config, "train")) == demonstrations
    for problem in held_out:
        described = TASKS["traces"].describe(TASKS["traces"].read_problem(f"{problem} => 1"))
        assert TASKS["traces"].describe(TASKS["traces"].read_problem(described)) == described


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1]", "no JSON object"),
        ('{"prompt"', "not JSON"),
        ({"answer": "7"}, "'prompt' must be text, and is missing"),
        ({"prompt": "x", "answer": 7}, "'answer' must be text, and is 7"),
        ({"prompt": " \n", "answer": "7"}, "'prompt' must be text"),
        ({"prompt": "a\n<spawn>\nb", "answer": "7"}, "ends in a tag"),
        ({"prompt": "a", "answer": "a <result> b"}, "tag"),
        ({"prompt": PLAIN[0]["prompt"], "answer": "8"}, "another answer"),
        ({"prompt": PLAIN[0]["prompt"] + "\n", "answer": "8"}, "another answer"),
        ({**LINE, "calls": "text"}, "list of texts"),
        ({**LINE, "calls": [1]}, "list of texts"),
        ({**LINE, "calls": ["7\n"]}, "no_result"),
        ({**LINE, "calls": CALLS[:1]}, "lacks its last call"),
        ({**LINE, "calls": CALLS[:3]}, "lacks its last call"),
        ({**LINE, "calls": [*CALLS, CALLS[-1]]}, "more follow"),
        ({**LINE, "calls": ["<spawn>\n</spawn>\n", *CALLS[1:]]}, "empty_spawn"),
        ({**LINE, "calls": [CALLS[0], "<join>\n" + CALLS[1], *CALLS[2:]]}, "holds a join"),
        ({**LINE, "calls": [*CALLS[:3], "<result>\n2\n"]}, "malformed_result"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(tmp_path, line, said):
    with pytest.raises(ConfigError, match=r"mine.jsonl, line 3: ") as error:
        config_of(tmp_path, [PLAIN[0], "", line])
    assert said in str(error.value)
    assert "docs/tasks.md" in str(error.value)


def test_files_that_cannot_serve(tmp_path):
    with pytest.raises(ConfigError, match="holds no line"):
        config_of(tmp_path, [""])
    with pytest.raises(ConfigError, match="line 1: it spawns"):
        config_of(tmp_path, [LINE], method="serial")
    with pytest.raises(ConfigError, match="cannot be read"):
        config_of(tmp_path, [LINE], name=f"traces:{tmp_path / 'none.jsonl'}")
    with pytest.raises(ConfigError, match="name a file"):
        config_of(tmp_path, [LINE], name="traces:")
