"""Chat templates of Hugging Face tokenizers: Jinja, in a sandbox, as transformers renders them.

A template comes with a model from elsewhere. It may neither reach anything of Python nor change what it is given.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from apr_jax.config import ConfigError
from apr_jax.data.special_tokens import Stated

Message = Mapping[str, str]  # its "role" and "content"
_ROLES = ("system", "user", "assistant")


class ChatTemplate:
    """A chat template, ready to be rendered."""

    def __init__(self, source: str, variables: Mapping[str, str | None] | None = None) -> None:
        """Compile a template.

        Args:
            variables: what it may name besides the messages, such as `bos_token`; None stands for nothing.
        Raises:
            ConfigError: it is no Jinja.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        self._variables = {name: value for name, value in (variables or {}).items() if value is not None}
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ConfigError(f"the chat template is no Jinja: {_line(error)}") from error

    @classmethod
    def of(cls, stated: Stated) -> "ChatTemplate | None":
        """Return the template that the files of a tokenizer state, or None. Raises ConfigError for a wrong one."""
        config = stated.get("tokenizer_config.json", {})
        source = config.get("chat_template")
        if isinstance(source, list):  # several by name
            named = {each.get("name"): each.get("template") for each in source if isinstance(each, Mapping)}
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise ConfigError(f"tokenizer_config.json: chat_template must be text, not {type(source).__name__}")
        special = {name: config.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        texts = {name: value.get("content") if isinstance(value, Mapping) else value for name, value in special.items()}
        return cls(source, texts)

    def render(self, messages: Sequence[Message], *, opens_answer: bool = True) -> str:
        """Return the text of a conversation, which with `opens_answer` ends where the assistant's answer begins.

        Raises:
            ConfigError: the template refuses the messages, or fails.
        """
        for message in messages:
            if message["role"] not in _ROLES:
                raise ConfigError(f"a message is of {', '.join(_ROLES)}, not of {message['role']!r}")
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=opens_answer,
                tools=None,
                documents=None,
                **self._variables,
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise ConfigError(f"the chat template does not take this conversation: {_line(error)}") from error


class _Generation(Extension):
    """Jinja's tag of transformers around what an assistant wrote. Rendering does not need it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
