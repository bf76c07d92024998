"""D2: whole answers, drafting against decoding the same weights token by token, by turns.

    python benchmarks/everyday.py [--model smollm2-135m] [--sections everyday in-domain copying] [--rounds 2] [--json]

Sections: `everyday_prompts.jsonl` holds 100 prompts of ten kinds, written by hand, that nobody trains on; in-domain prompts are
of the kinds that the drafts were trained on (mini-5); `copy_prompts.jsonl` holds prompts whose answers repeat them: edits,
extraction, code, quotations. To each prompt the sides answer one after the other (A B C, then C B A), one request at a time,
nothing cached, the time for the prompt included:

- plain: autoregressive, no drafts. What the others are compared with;
- lookup: autoregressive, with drafts from prompt lookup;
- ngrams: of a model with n-grams of its own text (`unmask ngrams`): with drafts from both;
- speculative: a model that drafts for its own parent, with masks and from text.

Each side keeps one engine, as a server does: what it learns of costs and acceptance serves the next prompt. A prompt's ratio is
of the tokens/s over its rounds. Printed by kind of prompt: the median ratio, tokens per forward (every forward counted), drafts
accepted in a forward, the share of identical texts; and the deciles of the ratio over all prompts, with the drafts verified and
the masks run in a forward beside its plain token.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import Figure, arguments, figure, print_json, results_path, write_results
from rich.console import Console
from rich.progress import track
from rich.table import Table

import unmask
from unmask.engine.costs import MeasuredCosts
from unmask.engine.draft_statistics import DraftStatistics
from unmask.engine.engine import Engine
from unmask.engine.llm import LanguageModel
from unmask.engine.ngrams import NgramTable
from unmask.engine.parent import parent_of
from unmask.eval.mini5.tasks import mini5_tasks

EVERYDAY, COPYING = (Path(__file__).with_name(f"{name}_prompts.jsonl") for name in ("everyday", "copy"))
SECTIONS = ("everyday", "in-domain", "copying")
TARGET_MEDIAN, TARGET_DECILE = 1.5, 0.97
LOG = Console(stderr=True, width=140)


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with a user's turn."""

    id: str
    kind: str
    messages: list[dict[str, str]]


class RecordedCosts(MeasuredCosts):
    """Costs that also count what forwards hold beside one token of each sequence."""

    def __init__(self, kernels: str) -> None:
        super().__init__(kernels)
        self.forwards = self.verify_tokens = self.mask_tokens = 0

    def observe(self, counts_F: Sequence[int], seconds: float) -> None:
        super().observe(counts_F, seconds)
        tokens, noisy, _ = counts_F
        self.forwards, self.mask_tokens = self.forwards + 1, self.mask_tokens + noisy
        self.verify_tokens += tokens - noisy - 1


@dataclass(frozen=True)
class Answer:
    """Token ids up to and including the end, the forwards and accepted drafts they took, and the seconds."""

    ids: tuple[int, ...]
    forwards: int
    accepted: int
    seconds: float


@dataclass
class Side:
    """A model, decoding options, and an engine that stays.

    Attributes:
        clock: that measures answers; the engine learns its costs by the wall's.
        start: ids before the prompt.
        ngrams: to draft from.
    """

    model: LanguageModel
    clock: Callable[[], float]
    start: tuple[int, ...] = ()
    ngrams: NgramTable | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kernels = self.model.backend().kernels  # quantises the weights
        self.costs = RecordedCosts(kernels.partition("-")[0])
        drafting = DraftStatistics(costs=self.costs, ngrams=self.ngrams)
        self.engine: Engine = self.model.engine(max_num_seqs=1, prefix_cache=False, drafting=drafting)

    def answer(self, ids: Sequence[int], max_new_tokens: int) -> Answer:
        """Answer one prompt."""
        request = self.model.request((*self.start, *ids), max_new_tokens=max_new_tokens, **self.options)
        started = self.clock()
        (completion,) = self.engine.run([request])
        seconds = self.clock() - started
        return Answer(completion.ids, completion.forwards, completion.costs.accepted_drafts, seconds)


Answers = dict[str, list[Answer]]


def read_prompts(path: Path = EVERYDAY) -> list[Prompt]:
    """Prompts of a file."""
    return [Prompt(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts_of(section: str, per_kind: int) -> list[Prompt]:
    """The section's first prompts of each kind."""
    if section == "in-domain":
        return [
            Prompt(item.id, task.name, [{"role": "user", "content": item.prompt}])
            for task in mini5_tasks()
            for item in task.items("test", per_kind)
        ]
    by_kind: dict[str, list[Prompt]] = {}
    for prompt in read_prompts(EVERYDAY if section == "everyday" else COPYING):
        by_kind.setdefault(prompt.kind, []).append(prompt)
    return [prompt for kind in by_kind.values() for prompt in kind[:per_kind]]


def sides_of(model: LanguageModel, clock: Callable[[], float]) -> dict[str, Side]:
    """The model without drafts first, then with; where it drafts for its own parent, that parent, and the model itself."""
    is_speculative, ngrams = model.config.gated_lora_rank is not None, model.drafting.ngrams
    autoregressive, start = parent_of(model) if is_speculative else (model, ())
    sides = {
        "plain": Side(autoregressive, clock, start, options={"prompt_lookup": False}),
        "lookup": Side(autoregressive, clock, start),
    }
    if ngrams is not None:
        sides["ngrams"] = Side(autoregressive, clock, start, ngrams)
    if is_speculative:
        sides["speculative"] = Side(model, clock, ngrams=ngrams)
    return sides


def compare(
    sides: dict[str, Side], tokenizer: LanguageModel, prompts: Sequence[Prompt], *, rounds: int, max_new_tokens: int
) -> Iterator[tuple[Prompt, Answers]]:
    """All sides' answers to every prompt, by turns; before the first, each answers once unseen."""
    for number, prompt in enumerate(prompts):
        ids = tokenizer.encode_chat(prompt.messages)
        answers: Answers = {name: [] for name in sides}
        for round_number in range(-1 if number == 0 else 0, rounds):
            order = list(sides) if round_number % 2 == 0 else list(reversed(sides))
            for name in order:
                found = sides[name].answer(ids, max_new_tokens)
                if round_number >= 0:
                    answers[name].append(found)
        yield prompt, answers


def speed(answers: Sequence[Answer]) -> float:
    """Tokens/s over all of these together."""
    return sum(len(answer.ids) for answer in answers) / sum(answer.seconds for answer in answers)


def summarize(answered: Sequence[Answers], side: str) -> dict[str, float]:
    """Ratio, tokens per forward, accepted drafts per forward, tokens/s of both and the share of identical texts."""
    ratios = [speed(each[side]) / speed(each["plain"]) for each in answered]
    all_of_side = [answer for each in answered for answer in each[side]]
    forwards = sum(answer.forwards for answer in all_of_side)
    return {
        "prompts": len(answered),
        "median_ratio": statistics.median(ratios),
        "least_ratio": min(ratios),
        "tokens_per_forward": sum(len(answer.ids) for answer in all_of_side) / forwards,
        "accepted_per_forward": sum(answer.accepted for answer in all_of_side) / forwards,
        "plain_tokens_per_second": speed([answer for each in answered for answer in each["plain"]]),
        "tokens_per_second": speed(all_of_side),
        "identical": sum(len({a.ids for a in each[side] + each["plain"]}) == 1 for each in answered) / len(answered),
    }


def deciles(ratios: Sequence[float]) -> list[float]:
    """The nine deciles of the prompts' ratios."""
    return statistics.quantiles(ratios, n=10, method="inclusive") if len(ratios) > 1 else list(ratios) * 9


def figures(section: str, side: str, overall: dict[str, float], tenths: Sequence[float]) -> dict[str, Figure]:
    """Every figure with its target; one without a target says null."""
    is_best = section == "everyday" and side != "lookup"
    return {
        f"{section}_{side}_median_ratio": figure(overall["median_ratio"], TARGET_MEDIAN if is_best else None),
        f"{section}_{side}_first_decile": figure(tenths[0], TARGET_DECILE),
        f"{section}_{side}_identical": figure(overall["identical"], 1.0),
        f"{section}_{side}_tokens_per_forward": figure(overall["tokens_per_forward"]),
    }


def table(section: str, rows: dict[tuple[str, str], dict[str, float]]) -> Table:
    """One line per side and kind."""
    made = Table(
        section, "side", "prompts", "median", "least", "tokens/forward", "accepted", "plain/s", "tokens/s", "identical"
    )
    for (side, kind), row in rows.items():
        counts = (f"{row['tokens_per_forward']:.2f}", f"{row['accepted_per_forward']:.2f}")
        speeds = (f"{row['plain_tokens_per_second']:.0f}", f"{row['tokens_per_second']:.0f}", f"{row['identical']:.0%}")
        ratios = (f"{row['median_ratio']:.2f}x", f"{row['least_ratio']:.2f}x")
        made.add_row(kind, side, f"{row['prompts']:.0f}", *ratios, *counts, *speeds)
    return made


def measure(section: str, sides: dict[str, Side], model: LanguageModel, options: Any) -> dict[str, Any]:
    """One section: the table is printed, the figures are returned with what they are made of."""
    prompts = prompts_of(section, options.per_kind)
    limits = {"rounds": options.rounds, "max_new_tokens": options.max_new_tokens}
    compared = compare(sides, model, prompts, **limits)
    answered = list(track(compared, description=section, total=len(prompts), console=LOG))
    rows: dict[tuple[str, str], dict[str, float]] = {}
    found: dict[str, Any] = {"figures": {}, "deciles": {}, "forwards": {}}
    drafting = [side for side in sides if side != "plain"]
    for side in drafting:
        for kind in dict.fromkeys(prompt.kind for prompt in prompts):
            rows[side, kind] = summarize([each for prompt, each in answered if prompt.kind == kind], side)
        rows[side, "all"] = summarize([each for _, each in answered], side)
        tenths = deciles([speed(each[side]) / speed(each["plain"]) for _, each in answered])
        found["figures"] |= figures(section, side, rows[side, "all"], tenths)
        found["deciles"][side] = tenths
        costs = sides[side].costs
        found["forwards"][side] = {
            "verify_tokens": costs.verify_tokens / max(costs.forwards, 1),
            "mask_tokens": costs.mask_tokens / max(costs.forwards, 1),
        }
    LOG.print(table(section, rows))
    for side in drafting:
        held = found["forwards"][side]
        LOG.print(f"{side}: deciles " + " ".join(f"{value:.2f}" for value in found["deciles"][side]))
        LOG.print(f"{side}: {held['verify_tokens']:.2f} drafts verified and {held['mask_tokens']:.2f} masks a forward so far")
    found["rows"] = {f"{side} {kind}": row for (side, kind), row in rows.items()}
    return found


def clock_of(options: Any) -> Callable[[], float]:
    """What measures seconds."""
    return time.process_time if options.cpu_time else time.perf_counter


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="autoregressive, or one that drafts for its own parent")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--rounds", type=int, default=2, help="answers of each side to each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--per-kind", type=int, default=10, help="prompts of each kind")
    parser.add_argument("--threads", type=int, help="[default: all cores]")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of CPU: beside other processes, with --threads 1")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output; tables go to standard error")
    options = parser.parse_args(argv)
    if options.smoke:
        options.rounds, options.max_new_tokens, options.per_kind = 1, 8, 1
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = unmask.load(options.model, quantize="auto")
    sides = sides_of(model, clock_of(options))
    sections = {section: measure(section, sides, model, options) for section in options.sections}
    content = {"threads": torch.get_num_threads(), "sections": sections}
    write_results(results_path(options.results, "everyday"), content)
    if options.json:
        print_json({name: value for each in sections.values() for name, value in each["figures"].items()})


if __name__ == "__main__":
    main()
