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
from unmask.serve.protocol.messages import ChatMessage, FunctionSpec, NamedTool, ResponseFormat
from unmask.serve.served_model import PreparedRequests, ServedModel
from unmask.serve.tools import ToolChoice

_FIELD = re.compile(r"tools\[\d+\][\w.]*|tool_choice")


def prepare_chat(model: ServedModel, body: ChatRequest) -> PreparedRequests:
    """Engine requests of a chat completion body.

    Raises:
        ApiError: naming the field at fault.
    """
    model.check_name(body.model)
    functions, choice, parallel = _tools(body)
    ids = chat_ids(model, body.messages, body)
    calling = bool(functions) and choice.mode != "none"
    schema = _answer_schema(body.response_format)
    try:
        grammar = None if schema is None else model.compile("json_schema", json.dumps(schema))
    except RequestError as error:
        raise bad_request(str(error), "response_format.json_schema.schema") from error
    if calling:
        definitions = [each.model_dump() for each in functions]
        try:
            grammar = model.compile("tools", json.dumps([definitions, [choice.mode, choice.name], parallel, schema]))
        except RequestError as error:
            match = _FIELD.match(str(error))
            raise bad_request(str(error), "tools" if match is None else match[0]) from error
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    logprobs = None if not body.logprobs else body.top_logprobs or 0
    requests = model.requests(body, [ids], limit, model.config.max_tokens, field="messages", logprobs=logprobs, grammar=grammar)
    return PreparedRequests(requests, len(ids), calling, choice.name is not None)


def chat_ids(model: ServedModel, messages: Sequence[ChatMessage], body: ChatRequest | None = None) -> list[int]:
    """Token ids of a conversation and the header of its answer.

    Raises:
        ApiError: the model has no chat template, or it does not accept these messages.
    """
    if not model.tokenizer.has_chat_template:
        raise bad_request(f"model {model.name} has no chat template; use /v1/completions", "messages")
    functions, choice, _ = _tools(body)
    turns: list[Mapping[str, Any]] = [_template_message(model, each) for each in messages]
    tools = None
    try:
        # Only tools need the tool format: a model whose format is unknown can still chat.
        if functions or any(each.tool_calls or each.role == "tool" for each in messages):
            turns, tools = model.tool_format.messages(turns, functions, choice)
        return model.tokenizer.chat(turns, add_generation_prompt=True, tools=tools)
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


def _answer_schema(response_format: ResponseFormat | None) -> dict[str, Any] | None:
    """JSON schema of an answer without tool calls; None: any text."""
    if response_format is None or response_format.type == "text":
        return None
    schema = {"type": "object"} if response_format.json_schema is None else response_format.json_schema.schema_
    return schema if isinstance(schema, dict) else {} if schema else {"allOf": [False]}


def _tools(body: ChatRequest | None) -> tuple[list[FunctionSpec], ToolChoice, bool]:
    """The functions of a body, which of them must or may be called, and whether more than one call may be made."""
    if body is None or not body.tools:
        return [], ToolChoice("none"), False
    functions = [tool.function for tool in body.tools]
    tool_choice = body.tool_choice if body.tool_choice is not None else "auto"
    if isinstance(tool_choice, NamedTool):
        return functions, ToolChoice("required", tool_choice.function.name), False
    return functions, ToolChoice(tool_choice), body.parallel_tool_calls is not False
