"""Conversations as engine requests: chat template, tools and answer formats.

Owns what a chat body means. Knows no HTTP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from unmask.errors import RequestError, UnmaskError
from unmask.serve.errors import bad_request
from unmask.serve.protocol.chat import ChatRequest
from unmask.serve.protocol.messages import ChatMessage, FunctionSpec, Layout, NamedTool
from unmask.serve.served_model import PreparedRequests, ServedModel
from unmask.serve.tools import ToolChoice

_FIELD = re.compile(r"tools\[\d+\][\w.]*|tool_choice")


def prepare_chat(model: ServedModel, body: ChatRequest, *, default_tokens: int | None = None) -> PreparedRequests:
    """Engine requests of a chat completion body.

    Args:
        model: the served one.
        body: the request.
        default_tokens: without a limit in the body, if the context leaves so much room; None: the server's.

    Raises:
        ApiError: naming the field at fault.
    """
    functions, choice, parallel = _tools(body)
    ids = chat_ids(model, body.messages, body, functions, choice)
    calling = bool(functions) and choice.mode != "none"
    constraint = body.constraint
    if not calling:
        grammar = model.grammar(constraint)
    else:
        if constraint is not None and constraint.kind != "json_schema":
            raise bad_request(f"{constraint.field}: given beside tools; leave one of them out", constraint.field)
        model.grammar(constraint)  # so that an error names its field
        schema = None if constraint is None else _schema(constraint.source)
        definitions = [each.model_dump() for each in functions]
        try:
            grammar = model.compile("tools", json.dumps([definitions, [choice.mode, choice.name], parallel, schema]))
        except RequestError as error:
            match = _FIELD.match(str(error))
            raise bad_request(str(error), "tools" if match is None else match[0]) from error
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    logprobs = None if not body.logprobs else body.top_logprobs or 0
    default = model.config.max_tokens if default_tokens is None else default_tokens
    requests = model.requests(body, [ids], limit, default, field="messages", logprobs=logprobs, grammar=grammar)
    names = tuple(each.name for each in functions) if calling else ()
    return PreparedRequests(requests, len(ids), names, choice.name is not None)


def prompt_ids(model: ServedModel, body: ChatRequest) -> list[int]:
    """Token ids of the prompt of a chat completion body.

    Raises:
        ApiError: naming the field at fault.
    """
    functions, choice, _ = _tools(body)
    return chat_ids(model, body.messages, body, functions, choice)


def chat_ids(
    model: ServedModel,
    messages: Sequence[ChatMessage],
    layout: Layout,
    functions: Sequence[FunctionSpec] = (),
    choice: ToolChoice = ToolChoice("none"),
) -> list[int]:
    """Token ids of a conversation and the header of its answer, or the beginning of it.

    Raises:
        ApiError: the model has no chat template, or it does not accept these messages.
    """
    if not model.tokenizer.has_chat_template:
        raise bad_request(f"model {model.name} has no chat template; use /v1/completions", "messages")
    turns: list[Mapping[str, Any]] = [_template_message(model, each) for each in messages]
    begun = ""
    if layout.continue_final_message:
        last = turns.pop()
        if last["role"] != "assistant" or last.get("tool_calls"):
            raise bad_request("continue_final_message: the last message is no text of the assistant", "continue_final_message")
        begun = last["content"]
    tools = None
    try:
        # Only tools need the tool format: a model whose format is unknown can still chat.
        if functions or any(each.tool_calls or each.role == "tool" for each in messages):
            turns, tools = model.tool_format.messages(turns, functions, choice)
        ids = model.tokenizer.chat(
            turns,
            add_generation_prompt=layout.add_generation_prompt is not False or bool(layout.continue_final_message),
            tools=tools,
            variables=layout.chat_template_kwargs,
        )
        return ids + model.tokenizer.encode(begun, after=ids)
    except UnmaskError as error:
        raise bad_request(str(error), "messages") from error


def _template_message(model: ServedModel, message: ChatMessage) -> dict[str, Any]:
    """A message as chat templates read it: content as one text, a role they know."""
    fields: dict[str, Any] = {"content": None} | message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        fields["content"] = "\n".join(part.text for part in message.content)
    if message.role == "developer" and "developer" not in model.tokenizer.chat_template:
        fields["role"] = "system"
    return fields


def _schema(source: str) -> dict[str, Any]:
    """A JSON schema as an object."""
    schema = json.loads(source)
    return schema if isinstance(schema, dict) else {} if schema else {"allOf": [False]}


def _tools(body: ChatRequest) -> tuple[list[FunctionSpec], ToolChoice, bool]:
    """The functions of a body, which of them must or may be called, and whether more than one call may be made."""
    if not body.tools:
        return [], ToolChoice("none"), False
    functions = [tool.function for tool in body.tools]
    tool_choice = body.tool_choice if body.tool_choice is not None else "auto"
    if isinstance(tool_choice, NamedTool):
        return functions, ToolChoice("required", tool_choice.function.name), False
    parallel = body.parallel_tool_calls is not False
    if isinstance(tool_choice, str):
        return functions, ToolChoice(tool_choice), parallel
    allowed = [tool.function.name for tool in tool_choice.allowed_tools.tools]
    unknown = set(allowed) - {function.name for function in functions}
    if unknown:
        raise bad_request(f"tool_choice allows {min(unknown)[:64]!r}, which is not among tools; add it", "tool_choice")
    return [each for each in functions if each.name in allowed], ToolChoice(tool_choice.allowed_tools.mode), parallel
