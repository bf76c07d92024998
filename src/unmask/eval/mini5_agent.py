"""Function calls: a request in words, the functions there are, and the one right call as a JSON object.

Owns these questions and their schemas. Every value that an argument takes stands in the request, or in the function's choices.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from unmask.eval.mini5_families import Draw, Family, seeded
from unmask.eval.mini5_knowledge import PEOPLE, place

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_ROOMS = ("kitchen", "bedroom", "office", "garage", "hall", "bathroom", "cellar", "attic")
_DISHES = ("pizza", "soup", "salad", "pasta", "rice", "curry", "toast", "pie", "noodles", "tacos", "steak", "fish")
_EVENTS = ("lunch", "dentist", "meeting", "training", "concert", "test", "haircut", "party", "workshop", "lecture")
_LANGUAGES = ("French", "German", "Spanish", "Italian", "Polish", "Danish", "Turkish", "Greek")
_NOTES = (
    "call me back",
    "dinner is ready",
    "see you soon",
    "happy birthday",
    "the train is late",
    "good luck",
    "bring an umbrella",
)
_CURRENCIES = ("EUR", "USD", "GBP", "JPY", "CHF", "SEK")


@dataclass(frozen=True)
class Kind:
    """What an argument can be: its JSON schema, and values to draw."""

    schema: Mapping[str, Any]
    draw: Callable[[random.Random], Any]

    def shown(self) -> Any:
        """Its type or its choices, for the prompt."""
        return self.schema.get("enum") or self.schema["type"]


def _whole(low: int, high: int) -> Kind:
    return Kind({"type": "integer"}, lambda rng: rng.randint(low, high))


def _one_of(*values: str) -> Kind:
    return Kind({"enum": list(values)}, lambda rng: rng.choice(values))


def _text(*values: str) -> Kind:
    return Kind({"type": "string"}, lambda rng: rng.choice(values))


_TOWN = Kind({"type": "string"}, place)


@dataclass(frozen=True)
class Function:
    """A function, and a request that asks for it with the arguments' values filled in."""

    name: str
    request: str
    arguments: Mapping[str, Kind]

    def shown(self) -> str:
        """One line of JSON for the prompt."""
        return json.dumps({"name": self.name, "parameters": {key: kind.shown() for key, kind in self.arguments.items()}})

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


FUNCTIONS = (
    Function("set_timer", "Start a timer of {minutes} minutes.", {"minutes": _whole(2, 90)}),
    Function("get_weather", "What is the weather in {town} on {day}?", {"town": _TOWN, "day": _one_of(*_DAYS)}),
    Function("send_message", "Send {to} the message: {text}.", {"to": _text(*PEOPLE), "text": _text(*_NOTES)}),
    Function("call_contact", "Please call {contact}.", {"contact": _text(*PEOPLE)}),
    Function("turn_light", "Turn the light in the {room} {state}.", {"room": _text(*_ROOMS), "state": _one_of("on", "off")}),
    Function("set_temperature", "Set the {room} to {degrees} degrees.", {"room": _text(*_ROOMS), "degrees": _whole(15, 28)}),
    Function("order_food", "Order {count} portions of {dish}.", {"dish": _text(*_DISHES), "count": _whole(2, 9)}),
    Function("add_event", "Add a {title} on {day} to my calendar.", {"title": _text(*_EVENTS), "day": _one_of(*_DAYS)}),
    Function("find_hotel", "Find a hotel in {town} for {nights} nights.", {"town": _TOWN, "nights": _whole(2, 14)}),
    Function("translate", "Translate into {language}: {text}.", {"text": _text(*_NOTES), "language": _text(*_LANGUAGES)}),
    Function(
        "convert_money",
        "How much is {amount} {from} in {to}?",
        {"amount": _whole(5, 500), "from": _one_of(*_CURRENCIES[:3]), "to": _one_of(*_CURRENCIES[3:])},
    ),
    Function("book_table", "Book a table for {people} people on {day}.", {"people": _whole(2, 12), "day": _one_of(*_DAYS)}),
    Function("buy_ticket", "Buy a train ticket from {start} to {end}.", {"start": _TOWN, "end": _TOWN}),
    Function("set_volume", "Set the volume to {level} percent.", {"level": _whole(1, 100)}),
)


def _call(function: Function, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A request, and the call that it asks for."""
    arguments = {key: kind.draw(rng) for key, kind in function.arguments.items()}
    return function.request.format(**arguments), {"name": function.name, "arguments": arguments}


def _draw(rng: random.Random, count: int) -> Draw | None:
    """A request, with `count` functions to choose from and one call of each as an example."""
    functions = rng.sample(FUNCTIONS, count)
    examples = [_call(each, rng) for each in functions]
    request, call = _call(rng.choice(functions), rng)
    if any(_shares_value(call, example) for _, example in examples):
        return None
    shown = "\n".join(each.shown() for each in functions)
    told = "\n".join(f"For the request '{asked}' the answer is {json.dumps(example)}" for asked, example in examples)
    asked = f"What is the answer for the request '{request}'? Answer with JSON only."
    schema = {"anyOf": [each.schema() for each in functions]} if count > 1 else functions[0].schema()
    return Draw(f"You have these functions:\n{shown}\n\n{told}\n\n{asked}", {"kind": "call", "answer": call}, schema)


def _shares_value(call: Mapping[str, Any], example: Mapping[str, Any]) -> bool:
    """Whether copying the example would get a part of the call right."""
    if call["name"] != example["name"]:
        return False
    return any(value == example["arguments"][key] for key, value in call["arguments"].items())


FAMILIES = (
    Family("one", seeded(lambda rng: _draw(rng, 1)), max_new_tokens=64),
    Family("two", seeded(lambda rng: _draw(rng, 2)), max_new_tokens=64),
    Family("three", seeded(lambda rng: _draw(rng, 3)), max_new_tokens=64),
)
