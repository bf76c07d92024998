"""D2: everyday prompts, speculative decoding against the same weights decoded autoregressively, by turns.

    python benchmarks/everyday.py [--model smollm2-135m-diffusion] [--rounds 2] [--json]

`everyday_prompts.jsonl` holds 100 prompts of ten kinds, written by hand, that nobody trains on. For each prompt both sides
answer one after the other (A B, then B A), one request at a time, nothing cached, the time for the prompt included. A
prompt's ratio is of the tokens/s over its rounds. Printed for each kind and overall: the median ratio, tokens per forward
(every forward counted), the accepted length (draft tokens accepted per verifying forward), and how many texts are identical;
and the deciles of the ratio over all prompts.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import arguments, results_path, write_results
from rich.console import Console
from rich.progress import track
from rich.table import Table

import unmask
from unmask.engine.llm import LanguageModel
from unmask.models.arch.gated_lora import parent_config
from unmask.models.arch.transformer import reconfigured

PROMPTS = Path(__file__).with_name("everyday_prompts.jsonl")
TARGET_MEDIAN, TARGET_KIND, TARGET_DECILE = 1.5, 1.0, 0.97
LOG = Console(stderr=True, width=120)


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt: a conversation that ends with a user's turn."""

    id: str
    kind: str
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class Timing:
    """An answer: its token ids, the forwards it took, and the seconds.

    Attributes:
        ids: up to and including the end-of-sequence token.
        forwards: all of them, prefill included.
        verifying: forwards after the first token that decided tokens.
        accepted: draft tokens accepted in these.
    """

    ids: tuple[int, ...]
    forwards: int
    verifying: int
    accepted: int
    seconds: float


@dataclass(frozen=True)
class Pair:
    """Both sides' answers to one prompt, one of each per round."""

    prompt: Prompt
    autoregressive: list[Timing]
    speculative: list[Timing]

    @property
    def ratio(self) -> float:
        """Speculative tokens/s over autoregressive tokens/s."""
        return _speed(self.speculative) / _speed(self.autoregressive)

    @property
    def is_identical(self) -> bool:
        """Whether all answers are the same tokens."""
        return len({timing.ids for timing in self.autoregressive + self.speculative}) == 1


def read_prompts(path: Path = PROMPTS) -> list[Prompt]:
    """All held-out prompts."""
    return [Prompt(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def answer(model: LanguageModel, ids: Sequence[int], max_new_tokens: int) -> Timing:
    """Answer one prompt in a fresh engine."""
    engine = model.engine(max_num_seqs=1, prefix_cache=False)
    request = model.request(tuple(ids), max_new_tokens=max_new_tokens)
    num_new: list[int] = []
    completion = None
    started = time.perf_counter()
    for update in engine.stream(request):
        num_new.append(len(update.new_ids))
        completion = update.completion or completion
    seconds = time.perf_counter() - started
    assert completion is not None
    verified = [count for count in num_new if count][1:]
    return Timing(completion.ids, completion.forwards, len(verified), sum(verified) - len(verified), seconds)


def compare(speculative: LanguageModel, prompts: Sequence[Prompt], *, rounds: int, max_new_tokens: int) -> Iterator[Pair]:
    """Both sides' answers to every prompt, by turns; before the first, each answers once unseen."""
    parent = reconfigured(speculative.transformer, parent_config(speculative.transformer.config))
    autoregressive = LanguageModel(parent, None, name="autoregressive", quantize="auto")
    start_id = speculative.config.start_id
    models = {"autoregressive": autoregressive, "speculative": speculative}
    for model in models.values():
        model.backend()  # quantises the weights
    for number, prompt in enumerate(prompts):
        ids = speculative.encode_chat(prompt.messages)
        inputs = {"autoregressive": ids if start_id is None else [start_id, *ids], "speculative": ids}
        answers: dict[str, list[Timing]] = {side: [] for side in models}
        if number == 0:
            for side, model in models.items():
                answer(model, inputs[side], max_new_tokens)
        for round_number in range(rounds):
            order = list(models) if round_number % 2 == 0 else list(reversed(models))
            for side in order:
                answers[side].append(answer(models[side], inputs[side], max_new_tokens))
        yield Pair(prompt, **answers)


def summarize(pairs: Sequence[Pair]) -> dict[str, float]:
    """Median ratio, tokens per forward, accepted length, tokens/s of both sides and the share of identical texts."""
    timings = [timing for pair in pairs for timing in pair.speculative]
    verifying = sum(timing.verifying for timing in timings)
    return {
        "prompts": len(pairs),
        "median_ratio": statistics.median(pair.ratio for pair in pairs),
        "tokens_per_forward": sum(len(timing.ids) for timing in timings) / sum(timing.forwards for timing in timings),
        "accepted_length": sum(timing.accepted for timing in timings) / max(1, verifying),
        "autoregressive_tokens_per_second": _speed([timing for pair in pairs for timing in pair.autoregressive]),
        "speculative_tokens_per_second": _speed(timings),
        "identical": sum(pair.is_identical for pair in pairs) / len(pairs),
    }


def deciles(ratios: Sequence[float]) -> list[float]:
    """The nine deciles of the prompts' ratios."""
    return statistics.quantiles(ratios, n=10, method="inclusive") if len(ratios) > 1 else list(ratios) * 9


def figures(kinds: Mapping[str, Mapping[str, float]], tenths: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Every figure with its target; one without a target is met by definition and says null."""
    overall = kinds["all"]
    values = {
        "median_ratio": (overall["median_ratio"], TARGET_MEDIAN),
        "first_decile": (tenths[0], TARGET_DECILE),
        "identical": (overall["identical"], 1.0),
        "tokens_per_forward": (overall["tokens_per_forward"], None),
        "accepted_length": (overall["accepted_length"], None),
        **{f"median_ratio_{kind}": (row["median_ratio"], TARGET_KIND) for kind, row in kinds.items() if kind != "all"},
    }
    return {
        name: {"value": value, "target": target, "met": None if target is None else value >= target}
        for name, (value, target) in values.items()
    }


def table(kinds: Mapping[str, Mapping[str, float]]) -> Table:
    """One line per kind."""
    made = Table("kind", "prompts", "median ratio", "tokens/forward", "accepted length", "AR tokens/s", "tokens/s", "identical")
    for kind, row in kinds.items():
        made.add_row(
            kind,
            f"{row['prompts']:.0f}",
            f"{row['median_ratio']:.2f}x",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['accepted_length']:.2f}",
            f"{row['autoregressive_tokens_per_second']:.0f}",
            f"{row['speculative_tokens_per_second']:.0f}",
            f"{row['identical']:.0%}",
        )
    return made


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m-diffusion", help="a model that drafts for its own parent")
    parser.add_argument("--rounds", type=int, default=2, help="answers of each side to each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--per-kind", type=int, default=10, help="prompts of each kind")
    parser.add_argument("--threads", type=int, help="[default: all cores]")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output; tables go to standard error")
    options = parser.parse_args(argv)
    if options.smoke:
        options.rounds, options.max_new_tokens, options.per_kind = 1, 8, 1
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    by_kind: dict[str, list[Prompt]] = {}
    for prompt in read_prompts():
        by_kind.setdefault(prompt.kind, []).append(prompt)
    prompts = [prompt for kind in by_kind.values() for prompt in kind[: options.per_kind]]
    model = unmask.load(options.model, quantize="auto")
    answered = compare(model, prompts, rounds=options.rounds, max_new_tokens=options.max_new_tokens)
    pairs = list(track(answered, description="everyday prompts", total=len(prompts), console=LOG))
    kinds = {kind: summarize([pair for pair in pairs if pair.prompt.kind == kind]) for kind in by_kind}
    kinds["all"] = summarize(pairs)
    tenths = deciles([pair.ratio for pair in pairs])
    LOG.print(table(kinds))
    LOG.print("deciles of the ratio: " + " ".join(f"{value:.2f}" for value in tenths))
    result = figures(kinds, tenths)
    by_prompt = {pair.prompt.id: {"ratio": pair.ratio, "tokens": len(pair.speculative[0].ids)} for pair in pairs}
    content = {"figures": result, "kinds": kinds, "deciles": tenths, "threads": torch.get_num_threads(), "prompts": by_prompt}
    write_results(results_path(options.results, "everyday"), content)
    if options.json:
        json.dump(result, sys.stdout)


def _speed(timings: Sequence[Timing]) -> float:
    """Tokens/s over all of these together."""
    return sum(len(timing.ids) for timing in timings) / sum(timing.seconds for timing in timings)


if __name__ == "__main__":
    main()
