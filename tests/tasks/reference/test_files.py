"""The authors' files: problems, lists of prompts, and SFT traces."""

import dataclasses
import json
import pathlib
import random
from typing import Any

import pytest

from apr_jax.evaluation.rollout_sources import ProblemFileError, read_problems
from apr_jax.files import FileError
from apr_jax.tasks import TASKS
from apr_jax.tasks.base import Demonstration
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.dialect import Dialect, demonstrated_tokens
from apr_jax.tasks.reference.files import ReferenceConfig, traces
from tests.configs import PAPER_TASK

ORACLES = pathlib.Path(__file__).parents[2] / "oracles"
TRACES: list[dict[str, Any]] = [
    json.loads(line) for line in (ORACLES / "reference_traces.jsonl").read_text().splitlines()
]
APR, SOSP = TASKS["reference_apr"], TASKS["reference_sosp"]


def _trace_dict(record: dict[str, Any]) -> dict[str, Any]:
    calls = [spawn["parent_text"] for spawn in record["spawns"]] + [record["parent_final_text"]]
    children = [
        [{"main_calls": [text], "sub_calls": []} for text in spawn["child_texts"]] for spawn in record["spawns"]
    ]
    return {"main_calls": calls, "sub_calls": children}


def _section(path: str) -> ReferenceConfig:
    return ReferenceConfig(**dataclasses.asdict(PAPER_TASK), traces=path)


@pytest.fixture
def apr_file(tmp_path: pathlib.Path) -> str:
    items = [{"nums": r["nums"], "target": r["target"], "trace_dict": _trace_dict(r), "rating": 0.5} for r in TRACES]
    path = tmp_path / "train_apr.json"
    path.write_text(json.dumps(items, indent=2))
    return str(path)


@pytest.mark.parametrize("task", ["countdown", "reference_apr", "reference_sosp"])
@pytest.mark.parametrize(
    "items",
    [
        [{"nums": [3, 7, 12], "target": 40, "solution": ["3*7=21"]}, {"nums": [1, 2], "target": 3}],
        [
            "Moving to Node #0\nCurrent State: 40:[3, 7, 12], Operations: []",
            "Current State: 3:[1, 2], Operations: []\n",
        ],
        [
            "Sub Call Budget: 10 Moving to Node #0\nCurrent State: 40:[3, 7, 12], Operations: []",
            "Token Budget: 4096 Current State: 3:[1, 2], Operations: []",
        ],
    ],
)
def test_lists_of_problems_and_of_prompts_are_read(tmp_path: pathlib.Path, items: list[Any], task: str) -> None:
    path = tmp_path / "val.json"
    path.write_text(json.dumps(items, indent=4))
    assert read_problems(TASKS[task], path) == [Problem((3, 7, 12), 40), Problem((1, 2), 3)]
    assert read_problems(TASKS[task], path, 1) == [Problem((3, 7, 12), 40)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"nums": [3, 7], "target": 10}, {"nums": [3, 7]}]', "item 2: no object with numbers"),
        ('[{"nums": "3, 7", "target": 10}]', "item 1: numbers='3, 7' is not a list"),
        ('["Moving to Node #0,1\\nCurrent State: 4:[2, 2], Operations: []"]', "item 1: .* is no root's prompt"),
        ("[\"Current State: 4:[2, 2], Operations: ['1+1=2']\"]", "item 1: .* is no root's prompt"),
        ("[[1, 2]]", "item 1: no object"),
        ("[1, 2", "cannot be read: not JSON"),
        ("[]", "holds no problem"),
    ],
)
def test_what_is_no_problem_is_named_by_its_place(tmp_path: pathlib.Path, text: str, message: str) -> None:
    path = tmp_path / "val.json"
    path.write_text(text)
    with pytest.raises(ProblemFileError, match=message):
        read_problems(APR, path)


def test_traces_are_calls_that_end_with_eos(apr_file: str) -> None:
    found = traces(apr_file)
    dialect = APR.dialect("adaptive", Dialect)
    for record in TRACES:
        problem = Problem(tuple(record["nums"]), record["target"])
        calls = found[problem]
        texts = [text for spawn in record["spawns"] for text in spawn["child_texts"]]
        texts = [*(spawn["parent_text"] for spawn in record["spawns"]), record["parent_final_text"], *texts]
        assert [call.context + call.completion for call in calls] == texts
        assert not any(call.ends_in_spawn for call in calls)
        assert calls[0].context.endswith("Operations: []\n")
        answer = dialect.demonstrated_answer(problem, calls)
        assert APR.verify(answer, problem).correct == record["parent_correct"]
        if record["parent_correct"]:
            last = next(call for call in reversed(calls) if call.depth == 0)
            assert last.completion[last.replay_start :].strip() == answer
        demonstration = Demonstration(problem, "adaptive", calls, answer, True)
        sequential, total, _ = demonstrated_tokens(dialect, demonstration, len)
        assert total == sum(len(call.completion) + 1 for call in calls)
        assert (sequential < total) == any(call.depth for call in calls)


@pytest.mark.parametrize("method", ["adaptive", "serial"])
def test_budgets_are_named_in_the_roots_prompt_alone(apr_file: str, tmp_path: pathlib.Path, method: str) -> None:
    del tmp_path
    record = next(record for record in TRACES if record["spawns"])
    problem = Problem(tuple(record["nums"]), record["target"])
    path = apr_file
    if method == "serial":
        path = apr_file.replace("apr", "sosp")
        items = [{"nums": record["nums"], "target": record["target"], "search_path": record["serial_text"]}]
        pathlib.Path(path).write_text(json.dumps(items))
    task = APR if method == "adaptive" else SOSP
    section = _section(path)
    calls = task.dialect(method, Dialect).demonstrate(problem, random.Random(0), section, len, budget=True)
    children = len(record["spawns"][0]["child_prompts"]) if len(record["spawns"]) == 1 else None
    roots = [call.context for call in calls if call.depth == 0]
    if method == "serial":
        assert roots[0].startswith("Token Budget: ")
        assert calls[0].completion == record["serial_text"].split("\n", 1)[1]
    else:
        assert all(root.startswith("Sub Call Budget: ") for root in roots)
        assert children is None or roots[0].startswith(f"Sub Call Budget: {children} Moving to Node #0\n")
        assert all(call.context.startswith("Moving to Node #0,") for call in calls if call.depth)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no list of problems"),
        ("[]", "no list of problems"),
        ("[{", "not JSON"),
        (
            '["Moving to Node #0\\nCurrent State: 3:[1, 2], Operations: []\\nNo"]',
            "item 1: ValueError: .* no root's prompt",
        ),
        ("[1]", "item 1: TypeError"),
        ('[{"nums": [1, 2], "target": 3}]', "item 1: KeyError: 'search_path'"),
        ('[{"nums": [1, 2], "target": 3, "search_path": "No"}]', "item 1: ValueError: no prompt"),
        ('[{"nums": [1, 2], "target": 3, "trace_dict": {"main_calls": []}}]', "item 1: KeyError: 'sub_calls'"),
    ],
)
def test_other_contents_are_refused_with_their_place(tmp_path: pathlib.Path, text: str, message: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(FileError, match=message):
        traces(str(path))


@pytest.mark.parametrize(("name", "method"), [("reference_apr", "adaptive"), ("reference_sosp", "serial")])
def test_a_list_of_prompts_has_problems_that_our_searches_solve(tmp_path: pathlib.Path, name: str, method: str) -> None:
    path = tmp_path / "apr_train_prefix.json"
    path.write_text(
        json.dumps([f"Moving to Node #0\nCurrent State: {r['target']}:{r['nums']}, Operations: []" for r in TRACES])
    )
    assert set(traces(str(path)).values()) == {()}
    problem = next(iter(traces(str(path))))
    dialect, section = TASKS[name].dialect(method, Dialect), _section(str(path))
    calls = dialect.demonstrate(problem, random.Random(0), section, len, budget=False)
    assert calls == dialect.demonstrate(problem, random.Random(0), _section(""), len, budget=False)
