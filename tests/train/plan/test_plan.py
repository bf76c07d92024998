"""Plans: counts against the real model, layouts and their errors, and what a plan says of memory and time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tiny import FAMILIES, MASK, pack, text, tiny_config
from unmask.diffusion.corrupt import CorruptionConfig, Stream, corrupt
from unmask.diffusion.drafts import DraftConfig, draft_stream
from unmask.diffusion.joint import JointConfig, joint_stream
from unmask.diffusion.masks import dense_mask
from unmask.diffusion.schedule import Bandwidth
from unmask.errors import ConfigError
from unmask.models.arch.transformer import Transformer
from unmask.train.parallel.dims import ParallelDims, layout_name, parse_layout
from unmask.train.plan.auto import layout_of
from unmask.train.plan.gpus import find_gpu
from unmask.train.plan.memory import stage_memory, stages
from unmask.train.plan.planner import Question, fastest_layout, find_plans, too_large
from unmask.train.plan.step import Batch, stage_transfers
from unmask.train.plan.work import RowWork, mean_row, num_parameters, row_works
from unmask.train.recipe import Recipe, parse_recipe

ROW = RowWork(share=1.0, length=64, positions=128, predictions=32, pairs=4096)
SCALE = Path(__file__).parents[3] / "recipes" / "scale"


def recipe(**changes: object) -> Recipe:
    values = {
        "model": "x",
        "data": {"sources": [{"kind": "jsonl", "path": "x"}], "row_length": 64},
        "objective": {"kind": "denoise", "complementary": False},
        "train": {"tokens": 6400, "batch_rows": 32, "micro_rows": 1},
        **changes,
    }
    return parse_recipe(values, "of the test")


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model(family: str) -> None:
    config = tiny_config(family)
    with torch.device("meta"):
        assert num_parameters(config) == Transformer(config).num_parameters()


def test_a_stream_is_noisy_and_clean_copies() -> None:
    schedule = {"warmup": [{"block_size": 1, "share": 1}], "stable": 1.0, "decay": [{"block_size": 16, "share": 2}]}
    one, whole, blocks = row_works(recipe(schedule=schedule))
    assert (one.positions, one.predictions) == (128, 64)
    assert (whole.positions, whole.predictions, whole.pairs) == (64, 32, 64 * 64)
    # Of 4 blocks of 16: each sees itself and, on average, 1.5 before it; noisy and clean.
    assert (blocks.positions, blocks.predictions, blocks.pairs) == (128, 32, 2 * 64 * (16 + 24))
    assert [row.share for row in (one, whole, blocks)] == [0.25, 0.25, 0.5]
    (pairs,) = row_works(recipe(objective={"kind": "denoise", "complementary": True}))
    assert (pairs.positions, pairs.predictions) == (3 * 64, 64)


def test_an_objective_without_plans_is_named() -> None:
    with pytest.raises(ConfigError, match=r"objective\.align"):
        row_works(recipe(objective={"kind": "joint", "align": 1.0}, decode_block_size=8))


def streams() -> dict[str, tuple[dict[str, object], Stream]]:
    """Recipes, and the stream that each makes of a document that fills its row."""
    rows, masks = pack([[text(64, 0)]], 64), CorruptionConfig(MASK, 8, complementary=True, start_id=1)
    drafts = DraftConfig(MASK, start_id=1, block_size=8, cuts=2)
    return {
        "draft": ({"kind": "draft"}, draft_stream(rows, drafts)),
        "joint": ({"kind": "joint", "cuts": 2}, joint_stream(rows, JointConfig(1, drafts=drafts, masks=masks), 0)),
        "preference": (
            {"kind": "preference", "mask_samples": 3, "bandwidth": [0.45, 0.55]},
            corrupt(rows, replace(masks, complementary=False, mask_samples=3, bandwidth=Bandwidth(0.45, 0.55)), 0),
        ),
    }


@pytest.mark.parametrize("kind", ["draft", "joint", "preference"])
def test_rows_are_those_of_the_streams_that_train(kind: str) -> None:
    objective, stream = streams()[kind]
    train = {"tokens": 64, "batch_rows": 4, "micro_rows": 2}
    data = {"sources": [{"kind": "jsonl", "path": "x"}], "row_length": 64, "overlong": "truncate"}
    (row,) = row_works(recipe(objective=objective, decode_block_size=8, train=train, data=data))
    assert row.positions == pytest.approx(stream.tokens_BT.shape[1], rel=0.04)
    assert row.predictions == pytest.approx(len(stream.target_N), rel=0.04)
    assert row.pairs == pytest.approx(int(dense_mask(stream.index).sum()), rel=0.1)
    if kind == "preference":
        assert (row.scored, row.scored_predictions, row.scored_pairs) == (row.positions, row.predictions, row.pairs)


def test_a_gated_lora_that_is_trained_further_is_planned_as_one_of_the_recipe() -> None:
    train = {"tokens": 64, "batch_rows": 4, "micro_rows": 2}
    gated = tiny_config("llama", mask_id=3, start_id=0, gated_lora_rank=4)
    plain = replace(gated, gated_lora_rank=None)
    values = {"objective": {"kind": "draft"}, "decode_block_size": 8}
    further = Question(recipe(**values, train=train), gated, find_gpu("h100"), 1)
    named = Question(recipe(**values, train={**train, "gated_lora_rank": 4}), plain, find_gpu("h100"), 1)
    for name in ("trained", "mean_row", "largest_row", "trained_config"):
        assert getattr(further, name) == getattr(named, name)


def test_of_a_stream_with_gated_lora_the_clean_copy_is_frozen() -> None:
    train = {"tokens": 64, "batch_rows": 4, "micro_rows": 2}
    objective = {"kind": "draft", "denoise_share": 0.25}
    whole = row_works(recipe(objective=objective, decode_block_size=8, train=train))
    gated = row_works(recipe(objective=objective, decode_block_size=8, train={**train, "gated_lora_rank": 4}))
    assert [row.share for row in gated] == [0.75, 0.25]
    for each, one in zip(gated, whole, strict=True):
        assert (each.frozen, each.positions + each.frozen, each.pairs + each.frozen_pairs) == (64, one.positions, one.pairs)
    config = tiny_config("llama")
    question = Question(
        recipe(objective=objective, decode_block_size=8, train={**train, "gated_lora_rank": 4}), config, find_gpu("h100"), 2
    )
    plan, full = (
        find_plans(each, ParallelDims(data_shard=2)).fitting[0] for each in (question, replace(question, recipe=recipe()))
    )
    assert plan.memory.optimizer < full.memory.optimizer / 2


def test_pairs_and_a_reference_are_planned() -> None:
    train = {"tokens": 6400, "batch_rows": 4, "micro_rows": 2}
    data = {"sources": [{"kind": "jsonl", "path": "x"}], "row_length": 64, "overlong": "truncate"}
    question = Question(
        recipe(objective={"kind": "preference"}, train=train, data=data), tiny_config("llama"), find_gpu("h100"), 4
    )
    (plan, *_) = find_plans(question, ParallelDims(data_shard=2, context=2)).fitting
    assert plan.memory.reference > 0
    with pytest.raises(ConfigError, match="pairs of rows"):
        find_plans(question, ParallelDims(data_shard=4))
    joint = recipe(objective={"kind": "joint", "parent_kl": 1.0}, decode_block_size=8, train=train)
    with pytest.raises(ConfigError, match=r"objective\.parent_kl"):
        find_plans(replace(question, recipe=joint), ParallelDims(data_shard=2, context=2))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("data=8", "data=8"),
        ("data_shard", "data_shard"),
        ("tensor=x", "tensor=x"),
        ("tensor=3", "6 processes"),
        ("data_shard=4", "4 processes"),
        ("expert=3", "expert"),
    ],
)
def test_a_wrong_layout_is_named(text: str, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        parse_layout(text, 8)


def test_layouts_are_read_as_they_are_written() -> None:
    dims = ParallelDims(data_replicate=2, data_shard=4, tensor=2, expert=4)
    assert parse_layout(layout_name(dims), 16) == dims
    assert parse_layout("tensor=2", 8) == ParallelDims(data_shard=4, tensor=2)
    assert parse_layout("data_shard=2,tensor=4") == ParallelDims(data_shard=2, tensor=4)
    interleaved = ParallelDims(pipeline=2, pipeline_schedule="interleaved_1f1b", pipeline_stages=2)
    assert parse_layout("pipeline=2,pipeline_schedule=interleaved_1f1b") == interleaved
    assert layout_name(ParallelDims()) == "data_shard=1"


def test_every_layout_is_planned_or_refused() -> None:
    question = Question(recipe(), tiny_config("llada2"), find_gpu("h100"), 8, price=2.0)
    plans = find_plans(question)
    assert [plan.seconds for plan in plans.fitting] == sorted(plan.seconds for plan in plans.fitting)
    assert not plans.too_large
    assert all(plan.dims.size == 8 for plan in plans.fitting)
    assert {layout_name(plan.dims) for plan in plans.fitting} >= {"data_shard=8", "data_shard=8,expert=8", "data_replicate=8"}
    assert any("key-value heads" in rule for rule in plans.refused)
    plan = plans.fitting[0]
    assert plan.cost == pytest.approx(2.0 * 8 * plan.days * 24)
    assert plan.tokens_per_day == pytest.approx(32 * 64 / plan.seconds * 86_400)
    with pytest.raises(ConfigError, match="key-value heads"):
        find_plans(question, ParallelDims(tensor=8))


def test_a_layout_is_chosen_for_the_processes_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = recipe(parallel="auto")
    monkeypatch.setattr("unmask.train.plan.auto.resolve", Path)
    monkeypatch.setattr("unmask.train.plan.auto.read_model_config", lambda folder: tiny_config("llada2"))
    question = Question(auto, tiny_config("llada2"), find_gpu("h100"), 8)
    chosen = layout_of(auto, 8, question.gpu)
    assert chosen == fastest_layout(question)
    assert chosen.size == 8
    assert layout_of(auto, 1, question.gpu) == ParallelDims()
    # On a CPU: as many shards as divide the rows, context ranks for the rest.
    assert layout_of(auto, 8, None) == ParallelDims(data_shard=8)
    few = recipe(parallel={"auto": True, "timeout": 5}, train={"tokens": 6400, "batch_rows": 6, "micro_rows": 1})
    assert layout_of(few, 8, None) == ParallelDims(data_shard=2, context=4)
    with pytest.raises(ConfigError, match="attention heads"):
        layout_of(few, 16, None)
    with pytest.raises(ConfigError, match=r"parallel\.auto.*tensor"):
        recipe(parallel={"auto": True, "tensor": 2})
    given = recipe(parallel={"tensor": 2})
    assert layout_of(given, 4, None) == ParallelDims(data_shard=2, tensor=2)


def test_no_layout_that_fits_is_one_line() -> None:
    question = Question(recipe(), tiny_config("llama", hidden_size=8192, ffn_size=131072), find_gpu("a100-40gb"), 1)
    with pytest.raises(ConfigError, match="no layout of 1 a100-40gb fits"):
        fastest_layout(question)


def test_stages_of_a_plan_are_those_that_train() -> None:
    config, dims = tiny_config("llada2", num_layers=7), ParallelDims(pipeline=4)
    cut = [range(stage.first, stage.last) for stage in stages(config, dims)]
    assert cut == dims.stage_layers(7) == [range(2), range(2, 4), range(4, 6), range(6, 7)]
    question = Question(recipe(), config, find_gpu("h100"), 4)
    (plan, *_) = find_plans(question, dims).fitting
    options = {"micro_rows": plan.batch.micro_rows, "micro_batches": plan.batch.micro_batches, "recompute": plan.recompute}
    (row,) = row_works(question.recipe)[-1:]
    each = [stage_memory(config, row, dims, stage, **options).total for stage in stages(config, dims)]
    assert plan.memory.total >= max(each)
    twice = ParallelDims(pipeline=2, pipeline_schedule="zero_bubble", pipeline_stages=2)
    with pytest.raises(ConfigError, match="pipeline_stages"):
        find_plans(Question(recipe(), config, find_gpu("h100"), 2), twice)


def test_traffic_is_that_of_the_slowest_stage() -> None:
    # The first layer is dense: the last stage has more routed ones, and the head.
    config, dims = tiny_config("llada2", num_layers=4), ParallelDims(data_shard=2, pipeline=2, expert=2)
    question = Question(recipe(), config, find_gpu("h100"), 4)
    (plan, *_) = find_plans(question, dims).fitting
    row, sent = mean_row(row_works(question.recipe)), []
    for stage in stages(config, dims):
        transfers = stage_transfers(config, row, dims, stage, plan.batch, recompute=plan.recompute)
        sent.append(sum(each.nvlink for each in transfers))
    assert sent[0] < sent[1]
    assert sum(plan.nvlink.values()) == pytest.approx(sent[1])


def test_a_large_model_says_what_does_not_fit() -> None:
    question = Question(recipe(), tiny_config("llama", hidden_size=8192, ffn_size=131072), find_gpu("a100-40gb"), 1)
    plans = find_plans(question, ParallelDims())
    assert not plans.fitting
    assert "optimizer" in too_large(plans.too_large[0], question)


def test_traffic_stays_in_a_node_where_the_group_does() -> None:
    config, batch = tiny_config("llada2"), Batch(micro_rows=1, micro_batches=2)

    def sent(dims: ParallelDims) -> dict[str, tuple[bool, bool]]:
        (stage, *_) = stages(config, dims)
        transfers = stage_transfers(config, ROW, dims, stage, batch, recompute=False)
        return {each.name: (each.nvlink > 0, each.network > 0) for each in transfers}

    assert sent(ParallelDims(data_shard=8)) == {"data_shard": (True, False)}
    assert sent(ParallelDims(data_shard=16, expert=8)) == {"data_shard": (False, True), "expert": (True, False)}
    assert sent(ParallelDims(tensor=2, context=2, data_shard=4))["context"] == (True, False)
    assert sent(ParallelDims(data_replicate=2, data_shard=8))["data_replicate"] == (False, True)


@pytest.mark.parametrize("path", sorted(SCALE.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_fit_where_they_say(path: Path) -> None:
    from unmask.models.families.registry import published_config, read_config
    from unmask.train.recipe import load_recipe

    values, (_, gpus, gpu) = load_recipe(path), path.stem.rsplit("_", 2)
    question = Question(values, read_config(published_config(values.model)), find_gpu(gpu), int(gpus))
    (plan, *_) = find_plans(question, values.parallel.dims(int(gpus))).fitting
    assert plan.mfu > 0.1
