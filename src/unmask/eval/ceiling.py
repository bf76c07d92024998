"""The ceiling of self-speculative decoding: what drafts that are always right would reach, and what a model's own drafts do.

Owns the measurement over prompts and its summary. The text is the model's own, greedy; its drafts are made behind every token
of it in one forward of the training layout, from the weights as loaded. How an engine drafts is `engine.drafting`'s matter.

Legend: N drafts, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.data.packing import PackedRows
from unmask.data.records import JsonLinesRecords, Record
from unmask.diffusion.drafts import DraftConfig, draft_stream
from unmask.diffusion.joint import JointConfig, joint_stream
from unmask.diffusion.objectives import ban_mask
from unmask.engine.costs import ForwardCosts
from unmask.engine.llm import LanguageModel
from unmask.engine.prompts import Prompt
from unmask.errors import ConfigError, DataError
from unmask.train.forward import AttentionBackend, predicted_hidden, stream_hidden

BLOCK_SIZE = 8
"""Of the ceiling of a model that has none."""
_AT_ONCE = 128
"""Drafts whose distributions exist at once."""


@dataclass(frozen=True)
class PromptToMeasure:
    """A prompt, and the kind that it is counted with."""

    prompt: Prompt
    kind: str


@dataclass(frozen=True)
class MeasuredDraft:
    """A draft of one token: `distance` from the last verify token (from 1), and `overlap`, the sum of min(p, q)."""

    distance: int
    correct: bool
    overlap: float


@dataclass(frozen=True)
class MeasuredAnswer:
    """An answer, what it took, and the drafts behind each of its tokens (none for a model without masks)."""

    kind: str
    num_tokens: int
    forwards: int
    drafts: tuple[tuple[MeasuredDraft, ...], ...]

    @property
    def lengths(self) -> list[int]:
        """Behind each token, how many drafts are right before the first that is not."""
        return [next((i for i, draft in enumerate(run) if not draft.correct), len(run)) for run in self.drafts]

    @property
    def forwards_of_drafts(self) -> int:
        """Forwards that the answer takes where each runs and verifies all masks of a block."""
        decided, forwards, lengths = 1, 1, self.lengths
        while decided < self.num_tokens:
            decided += 1 + (lengths[decided - 1] if decided <= len(lengths) else 0)
            forwards += 1
        return forwards


def read_prompts(path: Path) -> list[PromptToMeasure]:
    """The prompts of a file: lines of text, or JSON lines with `messages` or `prompt`, and perhaps `kind`.

    Raises:
        DataError: it cannot be read, or a line holds no prompt.
    """
    if path.suffix == ".jsonl":
        records = JsonLinesRecords(str(path), _check_record)
        return [_of_record(records.read(number)) for number in range(len(records))]
    try:
        # Not `splitlines`: texts may hold other separators, such as U+2028.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts {path} cannot be read: {error}") from error
    prompts = [PromptToMeasure(line, "all") for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{path} holds no prompt; give one a line")
    return prompts


def _check_record(record: Record) -> None:
    if not (record.get("messages") or record.get("prompt")):
        raise DataError("neither messages nor prompt; give one of them")


def _of_record(record: Record) -> PromptToMeasure:
    return PromptToMeasure(record.get("messages") or record["prompt"], str(record.get("kind", "all")))


def measure(
    model: LanguageModel,
    prompts: Sequence[PromptToMeasure],
    *,
    block_size: int | None = None,
    max_new_tokens: int = 128,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Answer prompts greedily, one after the other, and measure drafts behind every token of the answers.

    Args:
        model: autoregressive or shifted.
        prompts: what to answer.
        block_size: tokens that a forward decides at most [default: the model's].
        max_new_tokens: of an answer.
        on_progress: called with answers done and all.

    Returns:
        The summary, JSON-able; see `summary`.

    Raises:
        ConfigError: the model's text is not what a causal computation verifies.
    """
    if model.config.mask_id is not None and not model.config.shifted:
        raise ConfigError(
            f"{model.name} is not shifted, so that nothing verifies its drafts; use a shifted or autoregressive model"
        )
    size, measured = block_size or model.config.block_size or BLOCK_SIZE, list[MeasuredAnswer]()
    if size < 2 and model.config.shifted:
        raise ConfigError(f"block_size is {size}; drafts take blocks of 2 tokens or more")
    for done, each in enumerate(prompts, start=1):
        ids = model.encode_prompt(each.prompt)
        options: dict[str, Any] = {"block_size": size} if model.config.shifted else {}
        answer = model.complete(ids, max_new_tokens=max_new_tokens, **options)
        drafts = drafts_behind(model, ids, answer.ids, size) if model.config.shifted and len(answer.ids) > 1 else ()
        measured.append(MeasuredAnswer(each.kind, len(answer.ids), answer.forwards, drafts))
        on_progress(done, len(prompts))
    return summary(measured, size, model.drafting.costs)


@torch.no_grad()
def drafts_behind(
    model: LanguageModel, prompt_ids: Sequence[int], answer_ids: Sequence[int], block_size: int
) -> tuple[tuple[MeasuredDraft, ...], ...]:
    """The drafts that the model makes behind each token of an answer, as many as a block holds and as the answer has.

    A draft is the most probable token. `overlap` is the sum over the vocabulary of min(p, q), q being the distribution that
    drafts and p the one that verifies: how often rejection sampling at temperature 1 accepts what is drawn from q, that is, the
    mean of min(1, p / q).
    """
    config, weights, begin = model.config, model.transformer, len(prompt_ids)
    assert config.mask_id is not None
    assert config.start_id is not None
    rows = _one_row((*prompt_ids, *answer_ids), begin, weights.inv_freq.device)
    backend: AttentionBackend = "dense" if rows.tokens_RL.is_cuda else "blocked"
    stream = draft_stream(rows, DraftConfig(config.mask_id, config.start_id, block_size, cuts=block_size))
    clean = joint_stream(rows, JointConfig(config.start_id), 0)
    drafted_ND = predicted_hidden(weights, stream, backend)
    verify_ND = stream_hidden(weights, clean, backend, None, None)[clean.predict]
    first_N, position_N = (values_BT[stream.predict] for values_BT in (stream.index.block_BT, stream.position_BT))
    # Each cut begins where the answer does, but only the first with a whole block.
    whole_N = ((first_N > begin + 1) | (stream.copy_N == 1)).tolist()
    runs: dict[int, list[MeasuredDraft]] = defaultdict(list)
    for at in torch.arange(len(first_N)).split(_AT_ONCE):
        q_NV, p_NV = (_probabilities(model, part_ND) for part_ND in (drafted_ND[at], verify_ND[position_N[at] - begin]))
        correct_N, overlap_N = q_NV.argmax(-1) == stream.target_N[at], torch.minimum(p_NV, q_NV).sum(-1)
        columns = (at, first_N[at], position_N[at], correct_N, overlap_N)
        for n, first, position, correct, overlap in zip(*(column.tolist() for column in columns), strict=True):
            if whole_N[n]:
                runs[first].append(MeasuredDraft(position - first + 1, correct, overlap))
    return tuple(tuple(sorted(runs[first], key=lambda draft: draft.distance)) for first in sorted(runs))


def summary(measured: Sequence[MeasuredAnswer], block_size: int, costs: ForwardCosts) -> dict[str, Any]:
    """Figures of answers.

    Returns:
        `all`, and `kinds` by name: prompts, tokens; tokens per forward of drafts that are always right (`ceiling`), of the
        model's drafts if every forward runs all masks (`drafts`), and of its engine, prompt lookup and n-grams included
        (`achieved`); the mean accepted length, and the mean overlap (`introspective_acceptance`).
        `distances`: for each, the share of drafts that are right if all before are (`acceptance`), the share of runs that are
        right so far (`reach`) and the overlap.
        `speed`: times as fast as token by token, once the prompt is read, by the costs of forwards: at best, if all drafts were
        right (`ceiling`) and with the model's (`drafts`), and the masks a forward that this takes.
    """
    kinds = list(dict.fromkeys(each.kind for each in measured))
    by_kind = {kind: _figures([each for each in measured if each.kind == kind], block_size) for kind in kinds}
    lengths = [length for each in measured for length in each.lengths]
    return {
        "block_size": block_size,
        "all": _figures(measured, block_size),
        "kinds": by_kind if len(kinds) > 1 else {},
        "distances": _distances([run for each in measured for run in each.drafts]),
        "speed": _speed(lengths, block_size, costs),
    }


def _figures(measured: Sequence[MeasuredAnswer], block_size: int) -> dict[str, Any]:
    num_tokens = sum(each.num_tokens for each in measured)
    best = sum(1 + -(-(each.num_tokens - 1) // block_size) for each in measured)
    drafted = [each for each in measured if each.drafts]
    own = sum(each.forwards_of_drafts for each in measured) if drafted else None
    drafts = [draft for each in drafted for run in each.drafts for draft in run]
    return {
        "prompts": len(measured),
        "tokens": num_tokens,
        "ceiling": num_tokens / max(best, 1),
        "drafts": None if own is None else num_tokens / own,
        "achieved": num_tokens / max(sum(each.forwards for each in measured), 1),
        "accepted_length": _mean([length for each in drafted for length in each.lengths]),
        "introspective_acceptance": _mean([draft.overlap for draft in drafts]),
    }


def _distances(runs: Sequence[Sequence[MeasuredDraft]]) -> list[dict[str, Any]]:
    """Acceptance by distance, of the runs that are that long."""
    rows: list[dict[str, Any]] = []
    for distance in range(1, max(map(len, runs), default=0) + 1):
        long = [run for run in runs if len(run) >= distance]
        reached = [run for run in long if all(draft.correct for draft in run[: distance - 1])]
        right = sum(run[distance - 1].correct for run in reached)
        rows.append(
            {
                "distance": distance,
                "acceptance": right / len(reached) if reached else None,
                "reach": right / len(long),
                "overlap": _mean([run[distance - 1].overlap for run in long]),
            }
        )
    return rows


def _speed(lengths: Sequence[int], block_size: int, costs: ForwardCosts) -> Mapping[str, Any]:
    """The best speeds over numbers of masks, which the next forward verifies beside as many new ones."""
    plain, options = costs.cost(1, 0, 0), range(block_size)
    prices = [costs.cost(1 + 2 * count, count, 0) / plain for count in options]
    ceiling = max(options, key=lambda count: (1 + count) / prices[count])
    figures: dict[str, Any] = {"ceiling": (1 + ceiling) / prices[ceiling], "ceiling_masks": ceiling}
    if not lengths:
        return {**figures, "drafts": None, "drafts_masks": None}
    written = [1 + sum(min(length, count) for length in lengths) / len(lengths) for count in options]
    best = max(options, key=lambda count: written[count] / prices[count])
    return {**figures, "drafts": written[best] / prices[best], "drafts_masks": best}


def _probabilities(model: LanguageModel, hidden_ND: Tensor) -> Tensor:
    """Distributions [N, V] at temperature 1, the mask token banned."""
    return ban_mask(model.transformer.head(hidden_ND).float(), model.config.mask_id).softmax(-1)


def _one_row(ids: Sequence[int], begin: int, device: torch.device) -> PackedRows:
    """A single document, whose tokens from `begin` on are the answer."""
    tokens_RL = torch.tensor([ids], device=device)
    position_RL = torch.arange(len(ids), device=device)[None]
    zeros_RL = torch.zeros_like(tokens_RL)
    return PackedRows(tokens_RL, zeros_RL + 1, position_RL, position_RL >= begin, zeros_RL, zeros_RL)


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None
