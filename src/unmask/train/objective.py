"""What a stage minimises, as the loop sees it: gradients of a global batch, and figures of held-out rows.

Owns pre-training and fine-tuning by denoising (NELBO, with CAP if wanted), preference optimisation over the ELBO, and the
next-token training that conversions are compared with. Knows nothing of optimisers, checkpoints or the order of data. Every
normaliser is that of the global batch, so that neither loss nor gradient depends on how the batch is split.

Legend: R rows, N predictions, P pairs (R = 2P: chosen and rejected by turns), S noise samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unmask.data.packing import PackedRows
from unmask.diffusion.blocks import Phase
from unmask.diffusion.corrupt import CorruptionConfig, Stream, corrupt, next_token_stream
from unmask.diffusion.objectives import (
    TokenScores,
    confidence_loss,
    elbo_gains,
    nelbo,
    preference_loss,
    token_nll,
    token_scores,
)
from unmask.models.arch.transformer import Transformer
from unmask.train.metrics import Record
from unmask.train.recipe import CapSection, Recipe
from unmask.train.router import RouterMonitor
from unmask.train.step import AttentionBackend, MaskNoise, evaluate, predicted_hidden, score_stream

VALIDATION_SEED = 20_251_215
"""Noise of every evaluation, in every run: figures compare across runs."""


class Objective(Protocol):
    """What the loop needs of a stage."""

    def accumulate(self, rows: PackedRows, phase: Phase, step: int) -> Record:
        """Add the gradient of the global batch `rows` at optimiser step `step`; returns `loss` (nats) and what else to log."""
        ...

    def evaluate(self, rows: PackedRows, phase: Phase) -> Record:
        """Figures of held-out rows under fixed noise, among them `nelbo` (nats per token)."""
        ...


@dataclass(frozen=True, eq=False)
class Setting:
    """What all objectives work with. `router` is None for a dense model."""

    model: Transformer
    recipe: Recipe
    backend: AttentionBackend
    router: RouterMonitor | None

    def micro_batches(self, rows: PackedRows) -> Iterator[PackedRows]:
        """The batch in parts of `train.micro_rows`, on the model's device."""
        size = self.recipe.train.micro_rows
        for start in range(0, rows.num_rows, size):
            yield rows.rows(start, start + size).to(self.model.embed.weight.device)

    def hidden(self, stream: Stream, noise: MaskNoise | None = None, *, watched: bool = True) -> Tensor:
        """Hidden states of the predictions; `watched` forward passes count in the routers' load."""
        router = self.router if watched else None
        return predicted_hidden(self.model, stream, self.backend, noise, router)


@dataclass(frozen=True, eq=False)
class MaskedSetting(Setting):
    """What the objectives of diffusion work with."""

    mask_id: int

    def corruption(self, phase: Phase, *, draws: int | None = None) -> CorruptionConfig:
        """The recipe's, as of `ObjectiveSection.corruption`."""
        return self.recipe.objective.corruption(self.mask_id, self.model.config.start_id, phase.block_size, draws=draws)

    def score_held_out(self, rows: PackedRows, phase: Phase) -> Record:
        """NELBO, and mean cross-entropy by quarter of the mask rate, of held-out rows."""
        start_id = self.model.config.start_id
        corruption = CorruptionConfig(
            self.mask_id, phase.block_size, complementary=True, sampling="fixed_count", start_id=start_id
        )
        result = evaluate(self.model, self.micro_batches(rows), corruption, self.backend, VALIDATION_SEED)
        quarters = {f"ce_t{25 * (i + 1)}": value for i, value in enumerate(result.ce_by_quarter) if value is not None}
        return {"nelbo": result.nelbo, **quarters}


class Denoising:
    """`NELBO + lambda * L_conf`: pre-training and supervised fine-tuning, which differ by data, bandwidth and schedule.

    Source: LLaDA2.0 Eqs 1, 5 and section 4.2.
    """

    def __init__(self, setting: MaskedSetting) -> None:
        self._setting = setting
        self._cap = setting.recipe.objective.cap
        embedding = setting.model.embed.weight.detach().float()
        self._mask_norm = float(embedding.norm(dim=1).mean()) * setting.recipe.objective.mask_noise_scale

    def accumulate(self, rows: PackedRows, phase: Phase, step: int) -> Record:
        setting, train = self._setting, self._setting.recipe.train
        corruption = setting.corruption(phase)
        num_maskable = rows.num_maskable * corruption.num_copies
        noise = MaskNoise(self._noise_norm(step), train.seed, setting.mask_id)
        streams = [corrupt(part, corruption, train.seed) for part in setting.micro_batches(rows)]
        tally = None if self._cap is None else CapTally(self._cap, self._num_right(streams, noise))
        total = 0.0
        for stream in streams:
            hidden_ND = setting.hidden(stream, noise)
            if tally is None:
                nll_N = token_nll(setting.model.head, hidden_ND, stream.target_N, setting.mask_id)
                loss = nelbo(nll_N, stream.weight_N, num_maskable)
            else:
                scores = self._scores(hidden_ND, stream)
                loss = nelbo(scores.nll_N, stream.weight_N, num_maskable) + tally.add(scores.first(stream.num_masked))
            loss.backward()
            total += float(loss.detach())
        extra = {} if tally is None else tally.metrics()
        return {"loss": total, **extra, "mask_noise": noise.norm}

    def evaluate(self, rows: PackedRows, phase: Phase) -> Record:
        return self._setting.score_held_out(rows, phase)

    def _scores(self, hidden_ND: Tensor, stream: Stream) -> TokenScores:
        assert self._cap is not None
        setting, temperature = self._setting, self._cap.temperature
        return token_scores(setting.model.head, hidden_ND, stream.target_N, setting.mask_id, temperature=temperature)

    def _num_right(self, streams: list[Stream], noise: MaskNoise) -> int | None:
        """Right predictions of the global batch: a forward pass ahead when it is split, else None (the only part knows)."""
        if len(streams) == 1:
            return None
        with torch.no_grad():
            hidden = ((self._setting.hidden(stream, noise, watched=False), stream) for stream in streams)
            scores = (self._scores(hidden_ND, stream).first(stream.num_masked) for hidden_ND, stream in hidden)
            return sum(int(part.right_N.sum()) for part in scores)

    def _noise_norm(self, step: int) -> float:
        """Expected norm of the mask-embedding noise: linear decay to zero.

        Source: LLaDA2.0 section 3; scale and length are ours.
        """
        steps = self._setting.recipe.objective.mask_noise_steps
        return self._mask_norm * max(0.0, 1 - step / steps) if steps else 0.0


class CapTally:
    """The confidence term of a global batch, micro-batch by micro-batch, and the figures that tell whether it works."""

    def __init__(self, cap: CapSection, num_right: int | None) -> None:
        self._cap, self._num_right = cap, num_right
        self._right = self._predictions = self._sure = self._sure_right = 0
        self._entropy = 0.0

    def add(self, scores: TokenScores) -> Tensor:
        """This micro-batch's share of `lambda * L_conf`."""
        right, sure = scores.right_N, scores.confidence_N > self._cap.threshold
        self._predictions += len(right)
        self._right += int(right.sum())
        self._sure += int(sure.sum())
        self._sure_right += int((sure & right).sum())
        self._entropy += float(scores.entropy_N.detach().sum())
        num_right = self._right if self._num_right is None else self._num_right
        return self._cap.weight * confidence_loss(scores.entropy_N, num_right)

    def metrics(self) -> Record:
        """`right`: share of predictions whose argmax is right; `right_entropy`: their mean entropy (nats); `confident`: share
        above the decoding threshold, and `confident_right`: share of those that are right."""
        shares = {"right": self._right / max(self._predictions, 1), "confident": self._sure / max(self._predictions, 1)}
        return {
            **shares,
            "right_entropy": self._entropy / max(self._right, 1),
            "confident_right": self._sure_right / max(self._sure, 1),
        }


class NextToken:
    """Mean negative log-likelihood of the next token, causally: the autoregressive control of a conversion."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def accumulate(self, rows: PackedRows, phase: Phase, step: int) -> Record:
        setting = self._setting
        streams = [next_token_stream(part) for part in setting.micro_batches(rows)]
        num_predicted = max(1, sum(stream.num_maskable for stream in streams))
        total = 0.0
        for stream in streams:
            nll_N = token_nll(setting.model.head, setting.hidden(stream), stream.target_N, None)
            loss = nll_N.sum() / num_predicted
            loss.backward()
            total += float(loss.detach())
        return {"loss": total}

    @torch.no_grad()
    def evaluate(self, rows: PackedRows, phase: Phase) -> Record:
        setting, total, count = self._setting, 0.0, 0
        for part in setting.micro_batches(rows):
            stream = next_token_stream(part)
            total += float(score_stream(setting.model, stream, None, setting.backend).sum())
            count += stream.num_maskable
        return {"nelbo": total / max(count, 1)}


class Preference:
    """DPO over the ELBO: `-log sigmoid(beta * [dB(x_w) - dB(x_l)])`, policy and reference under the same noise.

    Rows come in pairs: chosen at 2i, rejected at 2i + 1. The S noise samples share one clean copy.

    Source: LLaDA2.0 Eq. 7; VRPO (2505.19223) for shared noise and several samples.
    """

    def __init__(
        self, setting: MaskedSetting, reference: Transformer, as_reference: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """`reference` evaluated under `as_reference()` is the reference policy: a frozen copy, or the model without adapter."""
        preference = setting.recipe.preference
        assert preference is not None
        self._setting, self._beta, self._samples = setting, preference.beta, preference.samples
        self._reference, self._as_reference = reference, as_reference

    def accumulate(self, rows: PackedRows, phase: Phase, step: int) -> Record:
        setting, num_pairs = self._setting, rows.num_rows // 2
        margins, losses = [], 0.0
        for part in setting.micro_batches(rows):
            margin_PS = self._margins(part, phase, setting.recipe.train.seed, train=True)
            loss = preference_loss(margin_PS.mean(1), self._beta).sum() / max(num_pairs, 1)
            loss.backward()
            losses += float(loss.detach())
            margins.append(margin_PS.detach())
        return {"loss": losses, **self._figures(torch.cat(margins))}

    @torch.no_grad()
    def evaluate(self, rows: PackedRows, phase: Phase) -> Record:
        parts = self._setting.micro_batches(rows)
        margin_PS = torch.cat([self._margins(part, phase, VALIDATION_SEED, train=False) for part in parts])
        loss = float(preference_loss(margin_PS.mean(1), self._beta).mean())
        return {**self._setting.score_held_out(rows, phase), "preference_loss": loss, **self._figures(margin_PS)}

    def _margins(self, rows: PackedRows, phase: Phase, seed: int, *, train: bool) -> Tensor:
        """`dB(x_w) - dB(x_l)` [P, S] in nats, by pair and noise sample."""
        setting = self._setting
        corruption = setting.corruption(phase, draws=self._samples)
        stream = corrupt(rows, corruption, seed)
        with torch.no_grad(), self._as_reference():
            hidden_ND = predicted_hidden(self._reference, stream, setting.backend)
            reference_N = token_nll(self._reference.head, hidden_ND, stream.target_N, setting.mask_id)
        hidden_ND = setting.hidden(stream, watched=train)
        policy_N = token_nll(setting.model.head, hidden_ND, stream.target_N, setting.mask_id)
        sample_N = stream.index.copy_BT[stream.predict] - 1
        shape = (rows.num_rows, corruption.num_copies)
        gain_RS = elbo_gains(policy_N, reference_N, stream.weight_N, stream.predict[0], sample_N, shape)
        return gain_RS[0::2] - gain_RS[1::2]

    def _figures(self, margin_PS: Tensor) -> Record:
        """`margin`: mean reward margin (beta * nats); `accuracy`: share of pairs whose chosen response gains more (tie: half);
        `variance`: of one pair's margin estimate (squared nats, over noise, divided by the samples)."""
        margin_P = margin_PS.mean(1)
        accuracy = ((margin_P > 0).double() + 0.5 * (margin_P == 0)).mean()
        samples = margin_PS.shape[1]
        spread = {"variance": float(margin_PS.var(1).mean()) / samples} if samples > 1 else {}
        return {"margin": self._beta * float(margin_P.mean()), "accuracy": float(accuracy), **spread}
