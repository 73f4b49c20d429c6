"""Chat templates: what they write, and what they may not do."""

import pytest

from apr_jax.config import ConfigError
from apr_jax.data.chat import ChatTemplate

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
