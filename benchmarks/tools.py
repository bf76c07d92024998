"""Tool calls of small models: does a model decide to call, and are the calls that it must make the right ones?

    python benchmarks/tools.py --model smollm2-135m-diffusion

Eight questions, each with one function that answers it among one to three that are offered; greedy, `tool_choice` auto and
required. Prints per mode how many questions led to calls, to a call of the right function, and to arguments that hold what the
question names. Calls are valid by construction, so that only the choice is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from common import arguments, results_path, write_results

import unmask
from unmask.serve.choice import Choice
from unmask.serve.config import ServerConfig
from unmask.serve.prepare_chat import prepare_chat
from unmask.serve.protocol.chat import ChatRequest
from unmask.serve.served_model import ServedModel

Mode = Literal["auto", "required"]
TEXT = {"type": "string"}
FUNCTIONS = {
    "get_weather": ("Current weather of a city", {"city": TEXT, "unit": {"enum": ["celsius", "fahrenheit"]}}, ["city"]),
    "send_email": ("Send an email", {"to": TEXT, "subject": TEXT, "body": TEXT}, ["to", "subject"]),
    "calculate": ("Evaluate an arithmetic expression", {"expression": TEXT}, ["expression"]),
}


@dataclass(frozen=True)
class Question:
    """A question, the function that answers it, the others that are offered, and what the arguments should hold."""

    text: str
    function: str
    named: str
    others: tuple[str, ...] = ()


QUESTIONS = (
    Question("What is the weather in Paris?", "get_weather", "Paris"),
    Question("What is the weather like in Tokyo, in celsius?", "get_weather", "Tokyo", ("send_email",)),
    Question("How warm is it in Berlin right now?", "get_weather", "Berlin", ("calculate",)),
    Question("Will I need an umbrella in Oslo?", "get_weather", "Oslo", ("send_email", "calculate")),
    Question("Send an email to bob@example.com with the subject Hello.", "send_email", "bob@example.com"),
    Question("Please email alice@example.com about the meeting.", "send_email", "alice@example.com", ("get_weather",)),
    Question("Calculate 23 * 17.", "calculate", "23"),
    Question("How much is 5 plus 7?", "calculate", "5", ("get_weather", "send_email")),
)


def calls(served: ServedModel, question: Question, mode: Mode, limit: int) -> list[dict[str, str]]:
    """The calls that the model makes: names and arguments."""
    tools = [tool(name) for name in sorted({question.function, *question.others})]
    message = {"role": "user", "content": question.text}
    fields = {"messages": [message], "tools": tools, "tool_choice": mode, "max_tokens": limit, "parallel_tool_calls": False}
    prepared = prepare_chat(served, ChatRequest.model_validate({"model": served.name, **fields}))
    (request,) = prepared.requests
    choice = Choice(0, request, prepared, served)
    for update in served.language_model.engine(num_tokens=request.canvas_length + 64).stream(request):
        choice.take(update)
    return [call.function.model_dump() for call in choice.tool_calls]


def tool(name: str) -> dict[str, Any]:
    """A function as OpenAI's `tools` describe it."""
    description, properties, required = FUNCTIONS[name]
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m-diffusion")
    parser.add_argument("--max-tokens", type=int, default=120)
    options = parser.parse_args(argv)
    model = unmask.load(options.model, quantize="none" if options.smoke else "auto")
    served = ServedModel(model, ServerConfig())
    questions, limit = (QUESTIONS[:1], 24) if options.smoke else (QUESTIONS, options.max_tokens)
    modes: tuple[Mode, ...] = ("auto", "required")
    figures = {}
    for mode in modes:
        made = [calls(served, question, mode, limit) for question in questions]
        right = [bool(each) and each[0]["name"] == question.function for each, question in zip(made, questions, strict=True)]
        named = [
            ok and question.named in each[0]["arguments"] for ok, each, question in zip(right, made, questions, strict=True)
        ]
        figures[mode] = {"calls": sum(map(bool, made)), "right_function": sum(right), "right_arguments": sum(named)}
        print(
            f"{options.model}, {mode}: of {len(questions)} questions " + ", ".join(f"{k} {v}" for k, v in figures[mode].items())
        )
    write_results(results_path(options.results, "tools"), {"model": options.model, "questions": len(questions), **figures})


if __name__ == "__main__":
    main()
