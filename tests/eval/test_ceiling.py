"""The ceiling of drafts: what is drafted behind every token, and the figures made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import refused
from tiny import MASK, tiny_model
from unmask.diffusion.objectives import ban_mask
from unmask.engine.costs import CostTable
from unmask.engine.llm import LanguageModel
from unmask.errors import ConfigError, DataError
from unmask.eval.ceiling import MeasuredAnswer, MeasuredDraft, drafts_behind, measure, read_prompts, summary
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.gated_lora import add_gated_lora

BLOCK, START = 4, 1
PROMPT, ANSWER = (7, 30, 12), (4, 9, 21, 33, 8, 40)


def shifted(*, gated: bool) -> LanguageModel:
    model = tiny_model("llama", 3, mask_id=MASK, start_id=START, block_size=BLOCK)
    return LanguageModel(add_gated_lora(model, 2, seed=0) if gated else model, None, name="tiny")


@pytest.mark.parametrize("gated", [False, True])
def test_drafts_are_those_of_decoding(gated: bool) -> None:
    """Behind each token of the answer: the causal tokens up to it, then masks that see each other."""
    model = shifted(gated=gated)
    runs = drafts_behind(model, PROMPT, ANSWER, BLOCK)
    assert [len(run) for run in runs] == [3, 3, 3, 2, 1]
    ids = (*PROMPT, *ANSWER)
    with torch.no_grad():
        for index, run in enumerate(runs):
            causal_end = len(PROMPT) + index + 1
            stop = causal_end + len(run)
            inputs = torch.tensor([START, *ids[: causal_end - 1], *[MASK] * len(run)])[None]
            allowed = torch.ones(stop, stop, dtype=torch.bool)
            allowed[:causal_end] = allowed.tril()[:causal_end]
            positions, noisy = torch.arange(stop)[None], torch.arange(stop)[None] >= causal_end
            hidden = model.transformer(inputs, positions, DenseAttend(allowed[None]), noisy_BT=noisy)[0]
            q = ban_mask(model.transformer.head(hidden[causal_end:]), MASK).softmax(-1)
            inputs, allowed = torch.tensor([START, *ids[: stop - 1]])[None], torch.ones(stop, stop, dtype=torch.bool).tril()
            verify = model.transformer(inputs, positions, DenseAttend(allowed[None]))[0]
            p = ban_mask(model.transformer.head(verify[causal_end:]), MASK).softmax(-1)
            assert [draft.distance for draft in run] == list(range(1, len(run) + 1))
            assert [draft.correct for draft in run] == [
                int(token) == target for token, target in zip(q.argmax(-1), ids[causal_end:stop], strict=True)
            ]
            assert [draft.overlap for draft in run] == pytest.approx(torch.minimum(p, q).sum(-1).tolist(), rel=1e-4)


def answer(*runs: str, kind: str = "all", forwards: int = 4) -> MeasuredAnswer:
    """Of runs such as "110": right, right, wrong."""
    drafts = [tuple(MeasuredDraft(i + 1, c == "1", 0.5) for i, c in enumerate(run)) for run in runs]
    return MeasuredAnswer(kind, len(runs) + 1, forwards, tuple(drafts))


def test_figures_by_hand() -> None:
    one = answer("110", "011", "111", "00", "1")
    assert one.lengths == [2, 0, 3, 0, 1]
    # A token of the prompt's forward, then 3 by two drafts, then 1, then 1.
    assert one.forwards_of_drafts == 4
    figures = summary([one, answer("1", kind="other", forwards=2)], BLOCK, CostTable())
    assert figures["all"] == pytest.approx(
        {
            "prompts": 2, "tokens": 8, "ceiling": 8 / (3 + 2), "drafts": 8 / (4 + 2), "achieved": 8 / (4 + 2),
            "accepted_length": 7 / 6, "introspective_acceptance": 0.5,
        }
    )  # fmt: skip
    assert list(figures["kinds"]) == ["all", "other"]
    assert [row["acceptance"] for row in figures["distances"]] == pytest.approx([4 / 6, 2 / 2, 1 / 2])
    assert [row["reach"] for row in figures["distances"]] == pytest.approx([4 / 6, 2 / 4, 1 / 3])
    # Tokens cost nothing in this table.
    assert figures["speed"] == pytest.approx({"ceiling": 4.0, "ceiling_masks": 3, "drafts": 1 + 7 / 6, "drafts_masks": 3})


def test_dear_masks_are_not_run() -> None:
    figures = summary([answer("000", "000")], BLOCK, CostTable({1: 1.0, 2: 2.0}))
    assert figures["speed"] == pytest.approx({"ceiling": 1.0, "ceiling_masks": 0, "drafts": 1.0, "drafts_masks": 0})


def test_prompts_of_a_file(tmp_path: Path) -> None:
    lines, records = tmp_path / "a.txt", tmp_path / "b.jsonl"
    lines.write_text("one\n\ntwo\n")
    records.write_text('{"prompt": "one"}\n{"messages": [{"role": "user", "content": "two"}], "kind": "chat"}\n')
    assert [each.prompt for each in read_prompts(lines)] == ["one", "two"]
    assert [each.kind for each in read_prompts(records)] == ["all", "chat"]
    records.write_text('{"prompt": "one\u2028two"}\n', encoding="utf-8")
    assert [each.prompt for each in read_prompts(records)] == ["one\u2028two"]
    records.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    with refused(DataError, "line 2", "messages", "prompt"):
        read_prompts(records)
    with refused(DataError, "absent"):
        read_prompts(tmp_path / "absent.txt")


def test_a_model_that_verifies_nothing_is_refused() -> None:
    model = LanguageModel(tiny_model("llama", mask_id=MASK, block_size=BLOCK), None, name="tiny")
    with refused(ConfigError, "tiny", "shifted"):
        measure(model, [])
