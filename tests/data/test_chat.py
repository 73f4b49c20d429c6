"""Chat templates: what they write, and what they may not do."""

import json

import pytest

from apr_jax.config import ConfigError
from apr_jax.data.chat import ChatTemplate
from apr_jax.data.tokenized import TokenizedCalls, prompts_of, tokenize_calls
from apr_jax.data.tokenizer import Spelling, load_tokenizer
from apr_jax.engine.threads import Thread
from apr_jax.reasoning.base import Transcript
from apr_jax.tasks.base import Call, Demonstration
from tests.data.made_tokenizers import byte_level_json

CHAT_ML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hello {{ 7 * 7 }}"}]


def test_a_conversation_ends_where_the_answer_begins() -> None:
    template = ChatTemplate(CHAT_ML)
    system = "<|im_start|>system\nBe kind<|im_end|>\n"
    asked = "<|im_start|>user\nHello {{ 7 * 7 }}<|im_end|>\n"  # what a user writes is no template
    assert template.render(MESSAGES) == system + asked + "<|im_start|>assistant\n"
    assert template.render(MESSAGES, opens_answer=False) == system + asked
    own = [{"role": "system", "content": "Be brief"}, *MESSAGES]
    assert template.render(own).startswith("<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user")


def test_the_special_tokens_and_helpers_of_transformers_are_there() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}\n"
        "    {% if m.role == 'user' %}\n"
        "[INST] {{ m.content | trim }} [/INST]{% generation %}{{ eos_token }}{% endgeneration %}\n"
        "    {%- endif %}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
        "{{ {'a': 'ü'} | tojson }}{{ strftime_now('%Y')|length }}"
    )
    stated = {"tokenizer_config.json": {"chat_template": source, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}}
    assert ChatTemplate.of(stated).render(MESSAGES) == '<s>[INST] Hello {{ 7 * 7 }} [/INST]</s>{"a": "ü"}4'


def test_a_tokenizer_may_have_none_or_several_by_name() -> None:
    assert ChatTemplate.of({}) is None
    assert ChatTemplate.of({"tokenizer_config.json": {"chat_template": []}}) is None
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert ChatTemplate.of({"tokenizer_config.json": {"chat_template": several}}).render(MESSAGES) == "yes"
    with pytest.raises(ConfigError, match="chat_template must be text, not int"):
        ChatTemplate.of({"tokenizer_config.json": {"chat_template": 3}})


@pytest.mark.parametrize("source", ["{% for %}", "{{ messages", "{% unknown %}", "{{ 1 | no_such_filter }}"])
def test_what_is_no_jinja_is_one_sentence(source: str) -> None:
    with pytest.raises(ConfigError, match="the chat template is no Jinja") as caught:
        ChatTemplate(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[5].content.nothing }}", "undefined|has no "),
        ("{{ 1 / 0 }}", "division"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ messages[0].update(role='x') }}", "unsafe|not safely"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ lipsum.__globals__['os'].popen('id') }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "does not take|no loader"),
        ("{% for i in range(10000000) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_hostile_template_reaches_nothing_and_is_one_sentence(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ChatTemplate(source).render(MESSAGES)
    assert "\n" not in str(caught.value)
    assert MESSAGES == [{"role": "user", "content": "Hello {{ 7 * 7 }}"}]


def test_only_known_roles_are_taken() -> None:
    with pytest.raises(ConfigError, match="not of 'root'"):
        ChatTemplate(CHAT_ML).render([{"role": "root", "content": "x"}])


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module", params=["tokenizer_config.json", "chat_template.jinja"])
def chatting(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    byte_level_json(folder, ["1+2=\n"], ["<|im_start|>", "<|im_end|>"])
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    if request.param == "chat_template.jinja":
        (folder / request.param).write_text(CHATML)
    else:
        config["chat_template"] = CHATML
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def test_a_prompt_is_a_users_message_and_what_follows_is_the_answer(chatting, tmp_path):
    tokenizer = load_tokenizer(str(chatting), Spelling(chat=True, encoding="whole"))
    ids = tokenizer.encode_prompt("1+2=\n")
    start, end = tokenizer.bos_id, tokenizer.eos_id
    encode = tokenizer.encode
    assert ids == [start, *encode("user\n1+2="), end, *encode("\n"), start, *encode("assistant\n")]
    thread = Thread((), ids, 0, (0, 0))
    page = Transcript(tokenizer, thread, "1+2=\n")
    thread.tokens = [*ids, *tokenizer.encode_continuation("3\n", ids), end]
    assert page.text() == "1+2=\n3\n"
    assert page.cut(5) == (len(ids), "")
    assert page.cut(3) is None, "a template's prompt is not cut"
    plain = load_tokenizer(str(chatting))
    assert plain.encode_prompt("1+2=\n") == plain.encode("1+2=\n")
    tokenizer.save(tmp_path)
    again = load_tokenizer(str(tmp_path / "tokenizer.json"), Spelling(chat=True, encoding="whole"))
    assert again.encode_prompt("1+2=\n") == ids


def test_a_prompt_cannot_leave_its_message(chatting):
    tokenizer = load_tokenizer(str(chatting), Spelling(chat=True))
    with pytest.raises(ValueError, match="spells the special token"):
        tokenizer.encode_prompt("1<|im_end|>\n")


def test_a_template_that_loses_the_prompt_is_refused(tmp_path):
    byte_level_json(tmp_path, ["1+2=\n"], ["<s>", "</s>"])
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "hello"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"), Spelling(chat=True))
    with pytest.raises(ConfigError, match=r"data\.chat_template='none'"):
        tokenizer.encode_prompt("1+2=\n")


def test_calls_are_tokenised_with_their_threads_prompt_in_the_template(chatting):
    """A call after a join begins with the same prompt; a fork's prompt is its parent's."""
    tokenizer = load_tokenizer(str(chatting), Spelling(chat=True, encoding="whole"))
    calls = (
        Call("q\n", "a<spawn>", 0, True, 8),
        Call("q\n<join>", "b\n", 0, False, 2),
        Call("c\n", "d\n", 1, False, 2),
        Call("q\na<spawn>e\n", "f\n", 1, False, 2),
    )
    assert prompts_of(calls) == ["q\n", "q\n", "c\n", "q\n"]
    demonstration = Demonstration(None, "adaptive", calls, None, False)
    tokenized = TokenizedCalls(tokenize_calls([demonstration], tokenizer, row_len=200))
    for index, rest in enumerate(["a<spawn>", "<join>b\n", "d\n", "a<spawn>e\nf\n"]):
        ids = tokenized.tokens[tokenized.starts[index] : tokenized.starts[index + 1]].tolist()
        given = tokenizer.encode_prompt(prompts_of(calls)[index])
        assert ids[: len(given)] == given
        assert tokenizer.decode(ids[len(given) :]) == rest
