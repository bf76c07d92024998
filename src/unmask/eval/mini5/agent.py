"""Tool calls: a request in words, the tools on offer, and the one right call as a JSON object.

Owns these questions and their schemas. Every argument's value stands in the request or among the tool's choices.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from unmask.eval.mini5.generator import Generator, Question, seeded
from unmask.eval.mini5.knowledge import PEOPLE, place

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_ROOMS = ("kitchen", "bedroom", "office", "garage", "hall", "bathroom", "cellar", "attic")
_DISHES = ("pizza", "soup", "salad", "pasta", "rice", "curry", "toast", "pie", "noodles", "tacos", "steak", "fish")
_EVENTS = ("lunch", "dentist", "meeting", "training", "concert", "test", "haircut", "party", "workshop", "lecture")
_LANGUAGES = ("French", "German", "Spanish", "Italian", "Polish", "Danish", "Turkish", "Greek")
_NOTES = (
    *("call me back", "dinner is ready", "see you soon", "happy birthday"),
    *("the train is late", "good luck", "bring an umbrella"),
)
_CURRENCIES = ("EUR", "USD", "GBP", "JPY", "CHF", "SEK")


@dataclass(frozen=True)
class ArgumentType:
    """The type of an argument: its JSON schema, and how to draw a value."""

    schema: Mapping[str, Any]
    draw: Callable[[random.Random], Any]

    def described(self) -> Any:
        """Its choices or its type, for the prompt."""
        return self.schema.get("enum") or self.schema["type"]


def _whole(low: int, high: int) -> ArgumentType:
    return ArgumentType({"type": "integer"}, lambda rng: rng.randint(low, high))


def _one_of(*values: str) -> ArgumentType:
    return ArgumentType({"enum": list(values)}, lambda rng: rng.choice(values))


def _text(*values: str) -> ArgumentType:
    return ArgumentType({"type": "string"}, lambda rng: rng.choice(values))


_TOWN = ArgumentType({"type": "string"}, place)


@dataclass(frozen=True)
class Tool:
    """A tool, and the template of a request for it."""

    name: str
    request: str
    arguments: Mapping[str, ArgumentType]

    def described(self) -> str:
        """A line of JSON for the prompt."""
        return json.dumps({"name": self.name, "parameters": {key: kind.described() for key, kind in self.arguments.items()}})

    def schema(self) -> dict[str, Any]:
        """The JSON schema of a call."""
        arguments = {
            "type": "object",
            "properties": {key: dict(kind.schema) for key, kind in self.arguments.items()},
            "required": list(self.arguments),
            "additionalProperties": False,
        }
        return {
            "type": "object",
            "properties": {"name": {"const": self.name}, "arguments": arguments},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }


TOOLS = (
    Tool("set_timer", "Start a timer of {minutes} minutes.", {"minutes": _whole(2, 90)}),
    Tool("get_weather", "What is the weather in {town} on {day}?", {"town": _TOWN, "day": _one_of(*_DAYS)}),
    Tool("send_message", "Send {to} the message: {text}.", {"to": _text(*PEOPLE), "text": _text(*_NOTES)}),
    Tool("call_contact", "Please call {contact}.", {"contact": _text(*PEOPLE)}),
    Tool("turn_light", "Turn the light in the {room} {state}.", {"room": _text(*_ROOMS), "state": _one_of("on", "off")}),
    Tool("set_temperature", "Set the {room} to {degrees} degrees.", {"room": _text(*_ROOMS), "degrees": _whole(15, 28)}),
    Tool("order_food", "Order {count} portions of {dish}.", {"dish": _text(*_DISHES), "count": _whole(2, 9)}),
    Tool("add_event", "Add a {title} on {day} to my calendar.", {"title": _text(*_EVENTS), "day": _one_of(*_DAYS)}),
    Tool("find_hotel", "Find a hotel in {town} for {nights} nights.", {"town": _TOWN, "nights": _whole(2, 14)}),
    Tool("translate", "Translate into {language}: {text}.", {"text": _text(*_NOTES), "language": _text(*_LANGUAGES)}),
    Tool(
        "convert_money",
        "How much is {amount} {from} in {to}?",
        {"amount": _whole(5, 500), "from": _one_of(*_CURRENCIES[:3]), "to": _one_of(*_CURRENCIES[3:])},
    ),
    Tool("book_table", "Book a table for {people} people on {day}.", {"people": _whole(2, 12), "day": _one_of(*_DAYS)}),
    Tool("buy_ticket", "Buy a train ticket from {start} to {end}.", {"start": _TOWN, "end": _TOWN}),
    Tool("set_volume", "Set the volume to {level} percent.", {"level": _whole(1, 100)}),
)


def _call(tool: Tool, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A request and the right call for it."""
    arguments = {key: kind.draw(rng) for key, kind in tool.arguments.items()}
    return tool.request.format(**arguments), {"name": tool.name, "arguments": arguments}


def draw_question(rng: random.Random, count: int) -> Question | None:
    """A request, with `count` tools to choose from and an example call of each."""
    tools = rng.sample(TOOLS, count)
    examples = [_call(each, rng) for each in tools]
    request, call = _call(rng.choice(tools), rng)
    if any(_shares_value(call, example) for _, example in examples):
        return None
    described = "\n".join(each.described() for each in tools)
    shots = "\n".join(f"For the request '{text}' the answer is {json.dumps(example)}" for text, example in examples)
    closing = f"What is the answer for the request '{request}'? Answer with JSON only."
    schema = {"anyOf": [each.schema() for each in tools]} if count > 1 else tools[0].schema()
    prompt = f"You have these functions:\n{described}\n\n{shots}\n\n{closing}"
    return Question(prompt, {"kind": "call", "answer": call}, schema)


def _shares_value(call: Mapping[str, Any], example: Mapping[str, Any]) -> bool:
    """Whether copying the example would make a part of the call right."""
    if call["name"] != example["name"]:
        return False
    return any(value == example["arguments"][key] for key, value in call["arguments"].items())


GENERATORS = (
    Generator("one", seeded(lambda rng: draw_question(rng, 1)), max_new_tokens=64),
    Generator("two", seeded(lambda rng: draw_question(rng, 2)), max_new_tokens=64),
    Generator("three", seeded(lambda rng: draw_question(rng, 3)), max_new_tokens=64),
)
