"""Chat templates: Jinja sources rendered with the names, filters and tags that Hugging Face's templates use.

Owns the Jinja environment. Knows no tokenizer and no ids; what must be kept from messages is `chat`'s matter. Jinja is imported
when the first conversation is rendered.

Source: chat templates as `transformers` documents and renders them; tests compare the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from unmask.errors import DataError

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

DEFAULT = "default"
_WITH_TOOLS = "tool_use"
_TAKEN = frozenset(("messages", "tools", "add_generation_prompt", "chat_template", "tokenize"))
"""What is no variable that a request may set: it has a field of its own, or chooses the template itself."""
# The names under which a message's reasoning is passed; templates read the first, some the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """The chat template of a tokenizer, or several by name: `tool_use` for conversations with tools, `default` for others.

    Args:
        sources: Jinja sources by name.
        tokens: variables of every conversation: the named tokens, such as `bos_token`.
    """

    def __init__(self, sources: Mapping[str, str], tokens: Mapping[str, str]) -> None:
        self._sources, self._tokens = dict(sources), dict(tokens)
        self._compiled: dict[str, Template] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The conversation as text; fields of messages that are None are left out.

        Raises:
            DataError: the template refuses the messages, or is no valid Jinja; or there are several without a default; or a
                variable has the name of something else.
        """
        from jinja2 import TemplateError

        if taken := _TAKEN.intersection(variables):
            raise DataError(f"{min(taken)} is no variable of the chat template; use another name")
        name = _WITH_TOOLS if tools is not None and _WITH_TOOLS in self._sources else DEFAULT
        if name not in self._sources:
            raise DataError(f"chat templates are named {', '.join(self._sources)}; one of them must be '{DEFAULT}'")
        chat = [_with_reasoning({key: value for key, value in each.items() if value is not None}) for each in messages]
        given = {**self._tokens, "documents": None, **variables}
        fixed = {"messages": chat, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            if name not in self._compiled:
                self._compiled[name] = self._environment.from_string(self._sources[name])
            return self._compiled[name].render({**given, **fixed})
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(" ".join(str(error).split())) from error

    @cached_property
    def _environment(self) -> ImmutableSandboxedEnvironment:
        from jinja2 import TemplateError, nodes
        from jinja2.exceptions import SecurityError
        from jinja2.ext import Extension
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.utils import Namespace

        class Generation(Extension):
            """The tag `generation`, which marks what an assistant writes; its body stands for it."""

            tags = {"generation"}  # noqa: RUF012  (declared so by Jinja)

            def parse(self, parser: Parser) -> nodes.Node:
                line = next(parser.stream).lineno
                # A scope of its own, as transformers gives it: what is set inside is not seen outside.
                return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

        class PlainNamespace(Namespace):
            """`namespace()` without attributes that begin with an underscore: those lead into Python."""

            def __init__(*args: Any, **attributes: Any) -> None:
                self, *values = args
                for name in dict(*values, **attributes):
                    _check_name(name)
                Namespace.__init__(self, *values, **attributes)

            def __setitem__(self, name: str, value: Any) -> None:
                _check_name(name)
                super().__setitem__(name, value)

        def _check_name(name: object) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"{name!r} is no name for an attribute of a namespace")

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": raise_exception, "strftime_now": _strftime_now, "dict": _Dict(), "namespace": PlainNamespace,
        }  # fmt: skip
        return environment


class _Dict:
    """`dict` as far as templates need it: the type itself would lead into Python."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    """The filter `tojson`; Jinja's own escapes what HTML must not hold."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the names that templates read, whatever name it came by."""
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
