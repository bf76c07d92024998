"""The conversion inside `unmask demo`: data the model writes itself, and a budget that fits the time.

Owns the prompts, the time box and the terminal plot. Training is `train.run`'s.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from unmask.cli.progress import showing_progress
from unmask.cli.training import default_recipe
from unmask.diffusion.blocks import Phase
from unmask.engine.llm import LanguageModel
from unmask.train.loop import accumulate
from unmask.train.metrics import read_metrics, smoothed
from unmask.train.recipe import Recipe, load_recipe
from unmask.train.run import RunResult, build_components, run_recipe
from unmask.train.state import list_checkpoints

ANSWER_TOKENS = 64
PROMPTS = (
    "What is the capital of France?",
    "What is the capital of Japan?",
    "What is the largest ocean?",
    "Who wrote Romeo and Juliet?",
    "What do bees make?",
    "What color is the sky on a clear day?",
    "How many legs does a spider have?",
    "What is photosynthesis?",
    "Why do we sleep?",
    "What is gravity?",
    "Name three fruits.",
    "Name two planets.",
    "What is a volcano?",
    "How do fish breathe?",
    "What is the opposite of hot?",
    "Give me a tip for learning a language.",
    "What is water made of?",
    "Why is exercise good for you?",
    "What is a poem?",
    "How do I boil an egg?",
    "What does a doctor do?",
    "What is the moon?",
    "Describe a cat in one sentence.",
    "Say something kind to a friend.",
)
# Share of the measured speed that is left with the optimiser, loading and saving.
_USABLE_SHARE = 0.6


def write_answers(model: LanguageModel, path: Path) -> int:
    """Let the model answer the built-in prompts, all at once, into a jsonl file; returns how many tokens it wrote."""
    answers = model.generate_batch([f"{prompt} Answer briefly." for prompt in PROMPTS], max_new_tokens=ANSWER_TOKENS)
    pairs = [(prompt, answer.text.strip()) for prompt, answer in zip(PROMPTS, answers, strict=True)]
    lines = [json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in pairs if response]
    path.write_text("".join(lines), encoding="utf-8")
    return sum(len(answer.ids) for answer in answers)


def plan_conversion(model: str, answers: Path, seconds: float) -> Recipe:
    """The demo's recipe with as many tokens as this machine trains in `seconds`, by the time of two steps without optimiser."""
    path = default_recipe("demo")
    overrides = [f"model={json.dumps(model)}", f"data.sources.0.path={json.dumps(str(answers))}"]
    recipe = load_recipe(path, overrides)
    rate = _tokens_per_second(recipe)
    at_least = 3 * recipe.train.batch_rows * recipe.data.row_length
    tokens = max(at_least, round(rate * seconds * _USABLE_SHARE))
    return load_recipe(path, [*overrides, f"train.tokens={tokens}"])


def run_conversion(console: Console, recipe: Recipe, out: Path, seconds: float) -> RunResult:
    """Convert, for at most `seconds`; the folder in the result is a model's in either case."""
    deadline = time.monotonic() + seconds
    with showing_progress(console, recipe.train.tokens) as on_record:
        result = run_recipe(recipe, out, on_record=on_record, should_stop=lambda: time.monotonic() > deadline)
    if result.finished:
        return result
    return replace(result, folder=list_checkpoints(out)[-1] / "model")


def terminal_plot(metrics: Path, width: int) -> str:
    """The smoothed training loss over tokens, drawn with characters; empty before there are two points to draw."""
    from plotext import figure

    train = [record for record in read_metrics(metrics) if record["kind"] == "train"]
    if len(train) < 2:
        return ""
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(width, 15)
    figure.title("loss (nats per token, smoothed) over tokens")
    curve = figure.signal([record["tokens"] for record in train], smoothed(record["loss"] for record in train))
    figure.draw(curve.lines())
    drawn: str = figure.build().string(colorless=True)
    return drawn


def _tokens_per_second(recipe: Recipe) -> float:
    """Speed of forward and backward passes, the second of two: the first one warms up."""
    components = build_components(recipe)
    phase = Phase("decay", recipe.decode_block_size, recipe.train.tokens)
    rate = 0.0
    for step in range(2):
        rows = components.packer.next_rows(recipe.train.micro_rows)
        started = time.perf_counter()
        accumulate(components.objective, rows, phase, step)
        rate = rows.num_tokens / (time.perf_counter() - started)
    return rate
