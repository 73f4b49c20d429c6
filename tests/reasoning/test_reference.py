"""APR and SoS+ as the authors' checkpoints write them, with vocabularies that have no marks, on prepared texts."""

import gzip
import json
import pathlib
import random
from collections.abc import Sequence
from typing import Any

import pytest

from apr_jax.data.tokenizer import Tokenizer, load_tokenizer
from apr_jax.engine.threads import Path, Rollout, RolloutKey
from apr_jax.reasoning.base import Settings
from apr_jax.reasoning.programs import make_program
from apr_jax.tasks import TASKS
from apr_jax.tasks.base import Call
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.dialect import Dialect
from apr_jax.tasks.reference.files import ReferenceConfig
from tests.configs import PAPER_TASK
from tests.data.made_tokenizers import byte_level_json, llama_like_json
from tests.reasoning.fixtures import settings
from tests.reasoning.forced_engine import ForcedEngine
from tests.reasoning.scripted_engine import ScriptedEngine

ORACLES = pathlib.Path(__file__).parents[1] / "oracles"
ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in gzip.decompress((ORACLES / "reference_reading.jsonl.gz").read_bytes()).splitlines()
]
SPAWNS = [row for row in ROWS if "prompts" in row or "error" in row]
ENDINGS = [row for row in ROWS if "answer" in row]
PROBLEM = Problem((2, 3, 4, 5), 14)
PROMPT = "Moving to Node #0\nCurrent State: 14:[2, 3, 4, 5], Operations: []"
NODES = (
    "\nExploring Operation: 4+5=9, Resulting Numbers: [2, 3, 9]\nGenerated Node #0,0: 14:[2, 3, 9] Operation: 4+5=9\n"
    "Exploring Operation: 2*3=6, Resulting Numbers: [4, 5, 6]\nGenerated Node #0,1: 14:[4, 5, 6] Operation: 2*3=6\n"
)
LINE = "<Start Sub Search 0 at level 1> Moving to Node #0,0\n"
SPAWN = f"<Calling Sub Searches>\n{LINE}<End Calling Sub Searches>\n"
WON = "\n14,14 equal: Goal Reached\nMoving to Node #0,0\nfound\n14,14 equal: Goal Reached\n"
LOST = "\nNo solution found.\n"
FAILED = "<Sub Searches>\n<No Solution in Sub Search 0 at level 1 at Node #0,0>\n<End Sub Searches>\n"


@pytest.fixture(scope="module", params=["byte_level", "llama_like"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    texts = [row["text"] for row in ENDINGS[:8]]
    if request.param == "byte_level":
        return load_tokenizer(str(byte_level_json(folder, texts, ["<s>", "</s>"])))
    return load_tokenizer(str(llama_like_json(folder, texts)))


class Texts:
    """Returns the texts of each thread's successive calls; EOS follows unless a text is given in brackets."""

    def __init__(self, tokenizer: Tokenizer, texts: dict[Path, list[Any]]) -> None:
        self._tokenizer, self._texts = tokenizer, {path: list(calls) for path, calls in texts.items()}
        self.contexts: dict[Path, list[str]] = {path: [] for path in texts}

    def __call__(self, path: Path, tokens: list[int]) -> Sequence[int]:
        self.contexts[path].append(self._tokenizer.decode(tokens))
        text = self._texts[path].pop(0)
        end = [] if isinstance(text, list) else [self._tokenizer.eos_id]
        return [*self._tokenizer.encode_continuation(text[0] if isinstance(text, list) else text, tokens), *end]


def run(
    script: Texts, tokenizer: Tokenizer, problem: Problem = PROBLEM, method: str = "adaptive", **changes: Any
) -> Rollout:
    """Runs one program on prepared texts."""
    task = TASKS["reference_apr" if method == "adaptive" else "reference_sosp"]
    given: Settings = settings(task=task, tokenizer=tokenizer, max_spawns=99, **changes)
    (rollout,) = ScriptedEngine(script).run([(RolloutKey(0, 0), make_program(method, problem, given))])
    return rollout


class Calls:
    """Writes what a demonstration's calls wrote, the root's in order."""

    def __init__(self, tokenizer: Tokenizer, calls: Sequence[Call]) -> None:
        self._tokenizer = tokenizer
        self._root = [call.context + call.completion for call in calls if not call.depth]
        self._children = [call.context + call.completion for call in calls if call.depth]

    def __call__(self, path: Path, tokens: list[int]) -> Sequence[int]:
        given = self._tokenizer.decode(tokens)
        texts = self._root if not path else self._children
        text = next(text for text in texts if text.startswith(given))
        texts.remove(text)
        return [*self._tokenizer.encode_continuation(text[len(given) :], tokens), self._tokenizer.eos_id]


@pytest.mark.parametrize(("method", "name"), [("adaptive", "reference_apr"), ("serial", "reference_sosp")])
def test_a_demonstration_is_decoded_to_its_own_calls(tokenizer: Tokenizer, method: str, name: str) -> None:
    section, task, solved = ReferenceConfig(**{**vars(PAPER_TASK)}, traces=""), TASKS[name], 0
    dialect = task.dialect(method, Dialect)
    for seed in range(6):
        problem = Problem((seed + 3, 8, 5, 12), 31 + seed)
        calls = dialect.demonstrate(problem, random.Random(seed), section, len, budget=False)
        program = make_program(method, problem, settings(task=task, tokenizer=tokenizer))
        (rollout,) = ScriptedEngine(Calls(tokenizer, calls)).run([(RolloutKey(0, 0), program)])
        written = [tokenizer.decode([*call.context, *call.tokens]) for call in rollout.calls]
        assert written == [call.context + call.completion for call in calls]
        answer = dialect.demonstrated_answer(problem, calls)
        assert rollout.result.answer == answer
        assert rollout.result.num_children == sum(call.depth > 0 for call in calls)
        solved += task.verify(answer, problem).correct
    assert solved


@pytest.mark.parametrize("row", SPAWNS, ids=lambda row: row["kind"])
def test_a_rollout_goes_on_as_the_oracle_says(row: dict[str, Any], tokenizer: Tokenizer) -> None:
    problem = Problem(tuple(row["numbers"]), row["target"])
    prompt = f"Moving to Node #0\nCurrent State: {row['target']}:{row['numbers']}, Operations: []"
    assert row["text"].startswith(prompt)
    texts: dict[Path, list[Any]] = {(): [row["text"][len(prompt) :], LOST]}
    for index, child in enumerate(row.get("children", [])):
        texts[0, index] = ["\n" + "\n".join(child.split("\n")[2:])]
    script = Texts(tokenizer, texts)
    outcome = run(script, tokenizer, problem).result
    if "error" in row:
        assert (outcome.status, outcome.reason) == ("malformed", "unknown_node")
        return
    assert [script.contexts[0, index] for index in range(len(row["prompts"]))] == [[p] for p in row["prompts"]]
    assert script.contexts[()] == [prompt, row["joined"]]
    assert [path for path in row["results"] if path] == list(outcome.child_paths)


@pytest.mark.parametrize("budget", [None, 10])
def test_the_root_alone_is_told_of_its_budget(tokenizer: Tokenizer, budget: int | None) -> None:
    script = Texts(tokenizer, {(): [NODES + SPAWN, LOST], (0, 0): [WON]})
    outcome = run(script, tokenizer, budget=budget).result
    named = "Sub Call Budget: 10 " if budget else ""
    joined = FAILED.replace("No Solution", "Goal Reached").replace(
        "#0,0>\n", "#0,0>\nMoving to Node #0,0\nfound\n14,14 equal: Goal Reached\n"
    )
    assert script.contexts[()] == [named + PROMPT, named + PROMPT + NODES + joined]
    assert script.contexts[0, 0] == ["Moving to Node #0,0\nCurrent State: 14:[2, 3, 9], Operations: ['4+5=9']"]
    assert outcome.num_children == 1


def test_serial_prompts_begin_at_the_state(tokenizer: Tokenizer) -> None:
    script = Texts(tokenizer, {(): [LOST]})
    run(script, tokenizer, method="serial", budget=4096)
    assert script.contexts[()] == ["Token Budget: 4096 Current State: 14:[2, 3, 4, 5], Operations: []"]


@pytest.mark.parametrize("glue", ["\n", "", " x", "é", "<"])
def test_the_beginning_of_a_join_is_replaced_by_that_of_a_spawn(tokenizer: Tokenizer, glue: str) -> None:
    first, rest = f"{NODES}a{glue}<Sub Searches>", SPAWN.removeprefix("<Calling Sub Searches>")
    script = Texts(tokenizer, {(): [[first + "never read"], rest, LOST], (0, 0): [LOST]})
    run(script, tokenizer)
    written = PROMPT + first.replace("<Sub", "<Calling Sub")
    assert script.contexts[()] == [PROMPT, written, PROMPT + f"{NODES}a{glue}" + FAILED]


def test_children_are_read_by_their_claims_alone(tokenizer: Tokenizer) -> None:
    spawn = SPAWN.replace(LINE, LINE + LINE.replace("#0,0", "#0,1") + LINE)
    texts = {
        (): [NODES + spawn, LOST],
        (0, 0): [WON.replace("\nfound", SPAWN)],
        (0, 1): ["\n14,14 equal: Goal Reached"],
    }
    script = Texts(tokenizer, {**texts, (0, 2): [WON]})
    outcome = run(script, tokenizer).result
    assert outcome.num_spawns == 1  # a child does not spawn
    assert outcome.num_children == 3  # one node twice
    assert len(outcome.child_paths) == 2
    assert outcome.child_reasons == ()
    assert "<No Solution in Sub Search 1 at level 1 at Node #0,1>" in script.contexts[()][1]


def test_a_spawn_without_lines_is_joined_at_once_and_one_without_a_beginning_takes_the_place_of_all(
    tokenizer: Tokenizer,
) -> None:
    for spawn, before in ((SPAWN.replace(LINE, ""), PROMPT + NODES), (f"{LINE}<End Calling Sub Searches>", "")):
        script = Texts(tokenizer, {(): [NODES + spawn, WON], (0, 0): [LOST]})
        outcome = run(script, tokenizer).result
        join = FAILED if LINE in spawn else "<Sub Searches>\n<End Sub Searches>\n"
        assert script.contexts[()][1] == before + join
        assert outcome.status == "answered"


@pytest.mark.parametrize(
    ("text", "status", "reason"),
    [(WON, "answered", ""), (LOST, "truncated", "max_steps"), ("x", "truncated", "max_steps")],
)
@pytest.mark.parametrize("method", ["adaptive", "serial"])
def test_a_thread_that_is_cut_off_is_read_to_its_end(
    tokenizer: Tokenizer, text: str, status: str, reason: str, method: str
) -> None:
    if method == "serial":
        text = text.replace("found", "Current State: 14:[2, 3, 9], Operations: ['1+1=2']\n" + NODES)
    task = TASKS["reference_apr" if method == "adaptive" else "reference_sosp"]
    program = make_program(method, PROBLEM, settings(task=task, tokenizer=tokenizer))
    steps = len(tokenizer.encode_continuation(text, [tokenizer.bos_id, 5]))
    engine = ScriptedEngine(Texts(tokenizer, {(): [text]}), max_steps=steps)
    (rollout,) = engine.run([(RolloutKey(0, 0), program)])
    assert (rollout.result.status, rollout.result.reason) == (status, reason)


def test_the_engines_own_host_plays_an_empty_spawn_and_a_replaced_mark(tokenizer: Tokenizer) -> None:
    spawn = SPAWN.removeprefix("<Calling Sub Searches>")
    script = Texts(tokenizer, {(): [NODES + SPAWN.replace(LINE, ""), ["<Sub Searches>"], spawn, WON], (1, 0): [WON]})
    program = make_program("adaptive", PROBLEM, settings(task=TASKS["reference_apr"], tokenizer=tokenizer))
    (rollout,) = ForcedEngine(script, lanes=2, max_seq_len=1024, pages=200).run([(RolloutKey(0, 0), program)])
    assert rollout.result.status == "answered"
    assert len(rollout.result.child_paths) == 1
