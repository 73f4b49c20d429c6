"""launch/generate.py as a user runs it: a run's policy, and one from elsewhere with a chat template."""

import dataclasses
import functools
import json

import pytest

from apr_jax.data.tokenizer import Spelling, load_tokenizer
from apr_jax.model.params import init_params
from apr_jax.model.weights.hf import save_hf
from tests.data.test_gguf_tokenizer import byte_level
from tests.launch.test_evaluate import launched, make_home, small_config

pytestmark = pytest.mark.heavy

generate = functools.partial(launched, "generate.py")
TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message.role + '\n' + message.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make_home(home)
    folder = home / "chatty"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(byte_level("qwen2")))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": TEMPLATE}))
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"), Spelling(encoding="whole"))
    model = dataclasses.replace(small_config(home).model, vocab_size=tokenizer.vocab_size)
    save_hf(folder, model, init_params(model, 1), tokenizer)
    return home


def test_a_runs_policy_goes_on_with_a_prompt_and_its_threads_are_shown(home):
    done = generate(home, "Moving to Node #0", "--max_tokens=12", "--json=written.json")
    written = json.loads((home / "written.json").read_text())
    (sample,) = written["samples"]
    assert done.stdout == sample["text"] + "\n"
    assert 0 < sample["tokens"] <= 12
    assert sample["finish_reason"] in ("max_steps", "stop")
    assert sample["tokens_per_second"] > 0
    assert written["text"] == sample["text"]
    assert "parent" in done.stderr
    assert "starts" in done.stderr
    assert " a second" in done.stderr


def test_a_chat_template_stands_around_a_users_words_and_the_text_streams(home):
    ask = functools.partial(generate, home, "--checkpoint=chatty", "--max_tokens=12", "--json=-")
    plain, chat = (json.loads(ask(*flags, "Hello", "there").stdout) for flags in ([], ["--chat"]))
    assert plain["prompt"] == chat["prompt"] == "Hello there"
    assert plain["samples"][0]["text"] != chat["samples"][0]["text"]
    again = generate(home, "--checkpoint=chatty", "--max_tokens=12", "Hello there")
    assert again.stdout == plain["samples"][0]["text"] + "\n"
    assert "parent" not in again.stderr


def test_several_samples_differ_and_a_seed_gives_them_again(home):
    ask = functools.partial(
        generate, home, "--checkpoint=chatty", "--samples=3", "--temperature=1", "--max_tokens=8", "--seed=5", "a"
    )
    done = ask("--json=samples.json")
    texts = [sample["text"] for sample in json.loads((home / "samples.json").read_text())["samples"]]
    assert len(set(texts)) == 3
    assert done.stdout == "".join(f"--- {n} of 3\n{text}\n" for n, text in enumerate(texts, start=1))
    assert ask().stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--checkpoint=missing"], "no such folder"),
        (["x", "--checkpoint=missing.gguf"], "no such folder or file"),
        ([], "there is no prompt"),
        (["x", "--samples=2"], "set --temperature"),
        (["x", "--chat"], "data.chat_template: 'none' there, 'auto' here"),
        (["x", "--chat", "--checkpoint=hugging_face"], "the policy's tokenizer has no chat template"),
        (["--chat", "a</s>b", "--checkpoint=chatty"], "spells the special token '</s>'"),
        (["no such words"], "the policy's tokenizer cannot spell this prompt"),
        (["x", "--checkpoint=chatty", "--max_tokens=0"], "max_tokens"),
        (["x " * 100, "--checkpoint=chatty"], "the policy's context ends at 64"),
    ],
)
def test_what_is_wrong_is_one_sentence(home, arguments, message):
    done = generate(home, *arguments, check=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
