"""Training of drafts: what a verified forward guesses behind what it checks.

Owns the objective and its figures. The layout is `diffusion.drafts`'.

Legend: N predictions.
"""

from __future__ import annotations

from itertools import groupby

import torch

from unmask.data.packing import PackedRows
from unmask.diffusion.blocks import Phase
from unmask.diffusion.corrupt import Stream
from unmask.diffusion.drafts import DraftConfig, draft_stream
from unmask.diffusion.objectives import token_nll, token_scores
from unmask.errors import ConfigError
from unmask.train.metrics import Record
from unmask.train.objective import Denoising, MaskedSetting
from unmask.train.recipe import DraftSection


class Drafting:
    """Mean weighted negative log-likelihood of drafts, given what is known and nothing of each other.

    A share of the steps denoises masks drawn at random instead, so that holes can be filled, too.

    Raises:
        ConfigError: the model is not shifted, so that nothing would check its drafts.
    """

    def __init__(self, setting: MaskedSetting, drafts: DraftSection) -> None:
        self._setting, self._drafts, self._denoising = setting, drafts, Denoising(setting)
        if not setting.model.config.shifted:
            raise ConfigError("objective.drafts takes a shifted model; convert with shift: true, or leave it out")

    def accumulate(self, rows: PackedRows, phase: Phase, step: int) -> Record:
        setting, share = self._setting, self._drafts.masks
        if int((step + 1) * share) > int(step * share):
            return self._denoising.accumulate(rows, phase, step)
        streams = [draft_stream(part, self._layout(phase, self._drafts.draws)) for part in setting.micro_batches(rows)]
        total_weight = max(sum(float(stream.weight_N.sum()) for stream in streams), 1.0)
        total = 0.0
        for stream in streams:
            nll_N = token_nll(setting.model.head, setting.hidden(stream), stream.target_N, setting.mask_id)
            loss = (nll_N * stream.weight_N).sum() / total_weight
            loss.backward()
            total += float(loss.detach())
        return {"loss": total}

    @torch.no_grad()
    def evaluate(self, rows: PackedRows, phase: Phase) -> Record:
        """`nelbo`: nats per draft, each weighing the same; `held`: mean count of right drafts before the first wrong one."""
        setting, total = self._setting, 0.0
        runs: list[int] = []
        count = 0
        for part in setting.micro_batches(rows):
            stream = draft_stream(part, self._layout(phase, 1))
            scores = token_scores(setting.model.head, setting.hidden(stream), stream.target_N, setting.mask_id, temperature=1.0)
            total += float(scores.nll_N.sum())
            count += stream.num_maskable
            runs += right_runs(stream, scores.right_N)
        return {"nelbo": total / max(count, 1), "held": sum(runs) / max(len(runs), 1)}

    def _layout(self, phase: Phase, draws: int) -> DraftConfig:
        config = self._setting.model.config
        assert phase.block_size is not None
        assert config.start_id is not None
        return DraftConfig(self._setting.mask_id, config.start_id, phase.block_size, draws, self._drafts.decay)


def right_runs(stream: Stream, right_N: torch.Tensor) -> list[int]:
    """Of every block of drafts in the stream, how many are right before the first that is not."""
    index = stream.index
    labels = torch.stack([x_BT[stream.predict] for x_BT in (index.copy_BT, index.document_BT, index.block_BT)], dim=1)
    blocks = zip(stream.predict[0].tolist(), *labels.T.tolist(), strict=True)
    runs = []
    for _, group in groupby(zip(blocks, right_N.tolist(), strict=True), key=lambda pair: pair[0]):
        rights = [right for _, right in group]
        runs.append(rights.index(False) if False in rights else len(rights))
    return runs
