"""Fine-tuning, preferences and mixtures as whole runs: what they start from, what they leave, and that they resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import unmask
from helpers import refused
from runs import stage_recipe, tiny_folder, tiny_jsonl, tiny_preferences, tiny_recipe, untimed_records
from unmask.engine.capabilities import capabilities
from unmask.errors import CheckpointError, ConfigError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.gated_lora import is_gated_lora, is_target
from unmask.models.weights.hub import NGRAMS
from unmask.models.weights.safetensors_io import iter_tensors
from unmask.train.loop import accumulate
from unmask.train.merge import merge_checkpoints
from unmask.train.recipe import Recipe, parse_recipe
from unmask.train.run import ADAPTER, build_components, run_recipe
from unmask.train.state import list_checkpoints, prune_checkpoints, save_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoregressive model, a diffusion one made from it, a mixture, and data."""
    folder = tmp_path_factory.mktemp("stages")
    tiny_folder(folder / "ar")
    tiny_jsonl(folder / "chats.jsonl")
    tiny_preferences(folder / "pairs.jsonl")
    run_recipe(tiny_recipe(folder / "ar", folder / "chats.jsonl", learning_rate=1e-3), folder / "diffusion")
    tiny_folder(folder / "mixture", family="llada2", num_layers=2)
    return folder


def sft(base: Path, **changes: Any) -> Recipe:
    return stage_recipe(base / "diffusion", base / "chats.jsonl", **changes)


def dpo(base: Path, **changes: Any) -> Recipe:
    return stage_recipe(
        base / "diffusion", base / "pairs.jsonl", objective={"kind": "preference", "mask_samples": 3}, **changes
    )


LORA = {"rank": 2}
FROZEN_LORA: dict[str, Any] = {"lora": LORA, "freeze_embeddings": True}
RUNS = {
    "sft": lambda base: sft(base, objective={"bandwidth": [0.3, 0.8], "sampling": "bernoulli"}),
    "cap": lambda base: sft(base, objective={"cap": {"weight": 1.0}, "mask_samples": 2}),
    "autoregressive": lambda base: control(base),
    "shifted": lambda base: shifted(base),
    "drafts": lambda base: drafts(base, denoise_share=0.4, tokens=1500),
    "sft-lora": lambda base: sft(base, lora=LORA),
    "dpo": dpo,
    "dpo-lora": lambda base: dpo(base, **FROZEN_LORA),
    "moe-bias": lambda base: mixture(base, "bias"),
    "moe-aux": lambda base: mixture(base, "aux"),
    "moe-frozen": lambda base: mixture(base, "frozen"),
}

SLOW = {"cap", "sft-lora", "dpo", "moe-aux", "moe-frozen"}
"""Each is like another one of the list."""


def mixture(base: Path, policy: str) -> Recipe:
    return tiny_recipe(base / "mixture", base / "chats.jsonl", tokens=1500, router={"policy": policy, "rate": 0.01})


def shifted(base: Path) -> Recipe:
    values = tiny_recipe(base / "ar", base / "chats.jsonl", tokens=1500).model_dump(mode="json")
    values["objective"] = {"kind": "joint", "draft_share": 0, "diffusion_weight": 2.0, "mask_samples": 2, "mask_noise_steps": 4}
    return parse_recipe(values | {"shift": True}, "test")


def joint(base: Path, *, objective: dict[str, Any] | None = None, **train: Any) -> Recipe:
    """All weights of an autoregressive model, for three ways of decoding."""
    values = drafts(base).model_dump(mode="json")
    values["objective"] = {"kind": "joint", "mask_noise_steps": 0, **(objective or {})}
    values["train"] |= {"gated_lora_rank": None, **train}
    return parse_recipe(values, "test")


def drafts(base: Path, *, denoise_share: float = 0.0, **train: Any) -> Recipe:
    """A gated LoRA of an autoregressive model, which drafts blocks of 8 for it."""
    values = tiny_recipe(base / "ar", base / "chats.jsonl", gated_lora_rank=4, learning_rate=1e-2, **train).model_dump(
        mode="json"
    )
    values["train"]["compute_dtype"] = train.get("compute_dtype", "float32")
    values["objective"] = {"kind": "draft", "cuts": 3, "denoise_share": denoise_share, "mask_noise_steps": 0}
    values["schedule"] = {"decay": [{"block_size": 8, "share": 1.0}]}
    return parse_recipe(values | {"shift": True}, "test")


def control(base: Path, **changes: Any) -> Recipe:
    """The autoregressive control: the same conversations, next token by next token."""
    values = stage_recipe(base / "ar", base / "chats.jsonl", objective={"kind": "next_token"}, **changes).model_dump(
        mode="json"
    )
    values["data"]["sources"][0]["eos_fill"] = None
    return parse_recipe(values, "test")


def stop_after(steps: int) -> Iterator[bool]:
    yield from [False] * (steps - 1)
    yield True


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in RUNS])
def test_a_resumed_run_tells_the_same_history(base: Path, tmp_path: Path, name: str) -> None:
    recipe = RUNS[name](base)
    assert run_recipe(recipe, tmp_path / "whole").finished
    stops = stop_after(4)
    first = run_recipe(recipe, tmp_path / "parts", should_stop=lambda: next(stops))
    assert not first.finished
    assert run_recipe(recipe, tmp_path / "parts", resume=True).finished
    assert untimed_records(tmp_path / "parts") == untimed_records(tmp_path / "whole")
    whole, parts = (unmask.load(tmp_path / run, dtype="float32").transformer.state_dict() for run in ("whole", "parts"))
    assert all(torch.equal(whole[tensor], parts[tensor]) for tensor in whole)


def test_sft_learns_and_keeps_mask_token_and_block_size(base: Path, tmp_path: Path) -> None:
    run_recipe(sft(base), tmp_path / "run")
    train = [record for record in untimed_records(tmp_path / "run") if record["kind"] == "train"]
    assert {record["block_size"] for record in train} == {8}
    assert sum(r["loss"] for r in train[-3:]) < sum(r["loss"] for r in train[:3])
    before, after = unmask.load(base / "diffusion"), unmask.load(tmp_path / "run")
    assert (after.config.mask_id, after.config.block_size) == (before.config.mask_id, 8)
    assert after.tokenizer is not None
    assert after.tokenizer.mask_id == after.config.mask_id


def test_what_ends_an_answer_is_saved_with_the_model(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "ar", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"eos_token_id": None}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": 7}')
    parts = build_components(tiny_recipe(tmp_path / "base", base / "chats.jsonl"))
    save_model(parts.model, parts.tokenizer, tmp_path / "saved")
    expected = [7, *sorted(parts.tokenizer.eos_ids)]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "saved" / name).read_text())["eos_token_id"] == expected


def test_the_control_learns_and_stays_autoregressive(base: Path, tmp_path: Path) -> None:
    run_recipe(control(base, learning_rate=3e-3), tmp_path / "run")
    scores = [record["nelbo"] for record in untimed_records(tmp_path / "run") if record["kind"] == "validation"]
    assert scores[-1] < scores[0]
    before, after = unmask.load(base / "ar"), unmask.load(tmp_path / "run")
    assert not after.is_diffusion
    assert after.config == before.config


def test_the_control_refuses_what_is_not_autoregressive(base: Path) -> None:
    with refused(ConfigError, "objective.kind", "next_token"):
        build_components(control(base).model_copy(update={"model": str(base / "diffusion")}))
    values = control(base).model_dump(mode="json")
    of_diffusion = {
        "schedule": {"stable": 1.0},
        "objective": {"kind": "next_token", "cap": {}},
        "shift": True,
        "mask_token": "x",
    }
    for key, value in of_diffusion.items():
        with refused(ConfigError, key):
            parse_recipe(values | {key: value}, "test")


def test_fine_tuning_refuses_an_autoregressive_model(base: Path, tmp_path: Path) -> None:
    with refused(ConfigError, "autoregressive"):
        run_recipe(stage_recipe(base / "ar", base / "chats.jsonl"), tmp_path / "run")


def test_a_shifted_conversion_learns_and_later_stages_stay_shifted(base: Path, tmp_path: Path) -> None:
    """Adapters, too. What shifting means for the loss is `tests/diffusion/test_shifted.py`'s matter."""
    recipe = tiny_recipe(base / "ar", base / "chats.jsonl", learning_rate=3e-3).model_copy(update={"shift": True})
    run_recipe(recipe, tmp_path / "shifted")
    start_id = unmask.load(tmp_path / "shifted").config.start_id
    assert start_id is not None
    train = [record for record in untimed_records(tmp_path / "shifted") if record["kind"] == "train"]
    assert sum(r["loss"] for r in train[-3:]) < sum(r["loss"] for r in train[:3])
    later = stage_recipe(tmp_path / "shifted", base / "chats.jsonl", lora=LORA)
    run_recipe(later, tmp_path / "later")
    assert unmask.load(tmp_path / "later").config.start_id == start_id
    assert unmask.load(tmp_path / "later" / ADAPTER).config.start_id == start_id


def test_a_gated_lora_learns_to_draft_and_leaves_the_parent_as_it_is(base: Path, tmp_path: Path) -> None:
    """But for the mask token's row, behind the others. A later stage goes on with them."""
    run_recipe(drafts(base, tokens=6000), tmp_path / "gated")
    found = [record for record in untimed_records(tmp_path / "gated") if record["kind"] == "validation"]
    assert found[-1]["nelbo"] < 0.85 * found[0]["nelbo"]
    assert found[-1]["accepted_length"] > found[0]["accepted_length"]
    parent, child = (unmask.load(folder, dtype="float32") for folder in (base / "ar", tmp_path / "gated"))
    theirs, ours = (model.transformer.state_dict() for model in (parent, child))
    assert all(torch.equal(tensor, ours[name][: len(tensor)]) for name, tensor in theirs.items())
    assert ours.keys() - theirs.keys() == set(filter(is_gated_lora, ours))
    assert child.config.gated_lora_rank == 4
    expected = parent.generate("say 3", max_new_tokens=20)
    assert child.generate("say 3", max_new_tokens=20, threshold=0.1).ids == expected.ids
    (tmp_path / "gated" / NGRAMS).write_bytes(b"a table")
    later = drafts(base, tokens=800).model_copy(update={"model": str(tmp_path / "gated"), "shift": False})
    run_recipe(later, tmp_path / "later")
    assert (tmp_path / "later" / NGRAMS).read_bytes() == b"a table"
    ours = unmask.load(tmp_path / "later", dtype="float32").transformer.state_dict()
    assert all(torch.equal(tensor, ours[name][: len(tensor)]) for name, tensor in theirs.items())


def test_only_the_targets_of_a_gated_lora_train(base: Path, tmp_path: Path) -> None:
    """A later stage may choose others, and a run goes on where it was."""
    recipe = drafts(base, tokens=800, gated_lora_targets=["out", "down"])
    stops = stop_after(2)
    assert not run_recipe(recipe, tmp_path / "first", should_stop=lambda: next(stops)).finished
    assert run_recipe(recipe, tmp_path / "first", resume=True).finished
    changes = {"gated_lora_rank": None, "gated_lora_targets": ["qkv"]}
    later = recipe.model_copy(
        update={"model": str(tmp_path / "first"), "shift": False, "train": recipe.train.model_copy(update=changes)}
    )
    run_recipe(later, tmp_path / "later")
    first, second = (unmask.load(tmp_path / name, dtype="float32").transformer.state_dict() for name in ("first", "later"))
    for name in filter(is_gated_lora, first):
        of_first, of_second = (is_target(name, targets) for targets in (["out", "down"], ["qkv"]))
        if name.endswith("gated_out"):
            assert bool(first[name].any()) == of_first
        assert torch.equal(first[name], second[name]) != of_second


def test_drafts_learn_from_what_verifies_them(base: Path, tmp_path: Path) -> None:
    values = drafts(base, tokens=800).model_dump(mode="json")
    run_recipe(
        parse_recipe(values | {"objective": {**values["objective"], "nll": 0, "kl": 1, "align": 1}}, "test"), tmp_path / "run"
    )
    train = [record for record in untimed_records(tmp_path / "run") if record["kind"] == "train"]
    assert all({"kl", "align"} <= record.keys() for record in train)
    theirs, ours = (unmask.load(folder, dtype="float32").transformer.state_dict() for folder in (base / "ar", tmp_path / "run"))
    assert all(torch.equal(tensor, ours[name][: len(tensor)]) for name, tensor in theirs.items())


def test_a_gated_lora_trained_in_fewer_bits_keeps_the_parent_to_the_bit(base: Path, tmp_path: Path) -> None:
    run_recipe(drafts(base, tokens=400, compute_dtype="bfloat16"), tmp_path / "gated")
    theirs, ours = (dict(iter_tensors(folder)) for folder in (base / "ar", tmp_path / "gated"))
    assert any((tensor != tensor.bfloat16()).any() for tensor in theirs.values()), "rounding would be seen"
    assert all(torch.equal(tensor, ours[name][: len(tensor)]) for name, tensor in theirs.items())
    assert all(ours[name].dtype == torch.bfloat16 for name in ours.keys() - theirs.keys())
    files = {path.name for path in (tmp_path / "gated").iterdir()}
    assert files >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert unmask.load(tmp_path / "gated").generate("say 3", max_new_tokens=4).ids


def test_what_a_gated_lora_does_not_go_with_is_refused(base: Path, tmp_path: Path) -> None:
    run_recipe(drafts(base, tokens=400), tmp_path / "gated")
    again = drafts(base).model_copy(update={"model": str(tmp_path / "gated"), "shift": False})
    other_rank = again.model_copy(update={"train": again.train.model_copy(update={"gated_lora_rank": 3})})
    with refused(ConfigError, "rank", 4, "train.gated_lora_rank"):
        build_components(other_rank)
    values = drafts(base).model_dump(mode="json")
    with refused(ConfigError, "dense", "shifted"):
        build_components(parse_recipe(values | {"shift": False}, "test"))
    values["train"]["gated_lora_rank"] = None
    with refused(ConfigError, "train.gated_lora_targets", "down", "train.gated_lora_rank"):
        build_components(parse_recipe(values | {"train": values["train"] | {"gated_lora_targets": ["down"]}}, "test"))
    with refused(ConfigError, "objective.kind", "draft", "shifted"):
        build_components(parse_recipe(values | {"shift": False}, "test"))
    for section, change, names in (
        ("train", {"gated_lora_rank": 4, "lora": LORA}, ("train.gated_lora_rank", "train.lora")),
        ("train", {"gated_lora_rank": 4, "gated_lora_targets": ["q_proj"]}, ("train.gated_lora_targets", "q_proj", "qkv")),
        ("objective", {"cap": {}}, ("objective.cap",)),
        ("schedule", {"stable": 1.0}, ("blocks", 2)),
    ):
        with refused(ConfigError, *names):
            parse_recipe(values | {section: values[section] | change}, "test")


def test_joint_training_needs_a_shifted_model(base: Path) -> None:
    with refused(ConfigError, "objective.kind joint", "shift: true"):
        build_components(joint(base).model_copy(update={"shift": False}))


def test_the_parent_of_joint_training_stays_as_it_was(base: Path) -> None:
    for train in ({}, FROZEN_LORA):
        parts = build_components(joint(base, objective={"parent_kl": 0.5}, **train))
        rows, phase = parts.packer.next_rows(2), parts.recipe.blocks.phases[0]
        assert accumulate(parts.objective, rows, phase, 0)["kl"] == pytest.approx(0, abs=1e-6)
        with torch.no_grad():
            for parameter in parts.model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        assert accumulate(parts.objective, rows, phase, 0)["kl"] > 1e-3


def test_a_joint_checkpoint_decodes_in_three_ways(base: Path, tmp_path: Path) -> None:
    """Token by token it says what it computes causally, drafts are verified by these, and blocks are denoised."""
    run_recipe(joint(base, tokens=1500), tmp_path / "run")
    model = unmask.load(tmp_path / "run", dtype="float32")
    assert capabilities(model.config).diffusion
    assert capabilities(model.config).speculative
    start_id, prompt = model.config.start_id, [5, 9, 7, 11]
    assert start_id is not None
    ids = [start_id, *prompt]
    for _ in range(20):  # a plain autoregressive decoder, which knows no cache and no masks
        positions, causal = torch.arange(len(ids))[None], torch.ones(1, len(ids), len(ids), dtype=torch.bool).tril()
        logits_V = model.transformer.head(model.transformer(torch.tensor(ids)[None], positions, DenseAttend(causal)))[0, -1]
        logits_V[model.config.mask_id] = float("-inf")
        ids.append(int(logits_V.argmax()))
    options: dict[str, Any] = {"max_new_tokens": 20, "ignore_eos": True, "temperature": 0.0}
    modes = {
        "ar": {"mode": "ar"},
        "speculative": {"prompt_lookup": False},
        "diffusion": {"mode": "diffusion", "threshold": 0.0},
    }
    answers = {name: model.engine().run([model.request(prompt, **options, **mode)])[0] for name, mode in modes.items()}
    assert list(answers["ar"].ids) == list(answers["speculative"].ids) == ids[1 + len(prompt) :]
    assert answers["ar"].forwards == 20
    assert answers["speculative"].forwards <= 20
    assert answers["diffusion"].forwards < 8  # three or four blocks, each at once and committed


def test_frozen_embeddings_stay_as_they_are(base: Path, tmp_path: Path) -> None:
    run_recipe(joint(base, tokens=300, freeze_embeddings=True), tmp_path / "run")
    before, after = (unmask.load(folder, dtype="float32").transformer for folder in (base / "ar", tmp_path / "run"))
    assert torch.equal(after.embed.weight[: len(before.embed.weight)], before.embed.weight)
    assert not torch.equal(after.blocks[0].attention.out.weight, before.blocks[0].attention.out.weight)


def test_a_converted_model_cannot_be_shifted_any_more(base: Path) -> None:
    with refused(ConfigError, "shift"):
        build_components(sft(base).model_copy(update={"shift": True}))


def test_another_mask_token_than_the_models_is_refused(base: Path) -> None:
    with refused(ConfigError, "mask_token"):
        build_components(sft(base).model_copy(update={"mask_token": "<|im_start|>"}))


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_lora_leaves_an_adapter_that_is_the_same_model(base: Path, tmp_path: Path, name: str) -> None:
    recipe = sft(base, lora=LORA) if name == "sft" else dpo(base, **FROZEN_LORA)
    run_recipe(recipe, tmp_path / "run")
    folded = unmask.load(tmp_path / "run", dtype="float32")
    adapted = unmask.load(tmp_path / "run" / ADAPTER, dtype="float32")
    ids = [3, 5, 7, 11, 13, 2]
    torch.testing.assert_close(adapted.logits(ids), folded.logits(ids), atol=1e-5, rtol=1e-5)
    original = unmask.load(base / "diffusion", dtype="float32").logits(ids)
    assert (folded.logits(ids) - original).abs().max() > 1e-3
    assert adapted.config.mask_id == folded.config.mask_id
    assert adapted.tokenizer is not None
    assert adapted.tokenizer.mask_id == adapted.config.mask_id
    # An adapter is a model like any other: training goes on from it, merging says what to do.
    assert run_recipe(sft(base).model_copy(update={"model": str(tmp_path / "run" / ADAPTER)}), tmp_path / "on").finished
    with refused(CheckpointError, "adapter"):
        merge_checkpoints([tmp_path / "run" / ADAPTER], tmp_path / "merged")


def test_dpo_prefers_the_chosen_answers(base: Path, tmp_path: Path) -> None:
    run_recipe(dpo(base, tokens=4000, learning_rate=1e-3), tmp_path / "run")
    train = [record for record in untimed_records(tmp_path / "run") if record["kind"] == "train"]
    assert train[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert (train[0]["reward_margin"], train[0]["reward_accuracy"], train[0]["margin_variance"]) == (0.0, 0.5, 0.0)
    assert train[-1]["reward_accuracy"] > 0.9
    assert train[-1]["reward_margin"] > 0
    held_out = [record for record in untimed_records(tmp_path / "run") if record["kind"] == "validation"][-1]
    assert held_out["reward_accuracy"] > 0.7
    assert held_out["preference_loss"] < 0.69


def test_the_reference_of_dpo_stays_as_it_was(base: Path) -> None:
    for recipe in (dpo(base), dpo(base, **FROZEN_LORA)):
        parts = build_components(recipe)
        rows = parts.packer.next_rows(4)
        phase = recipe.blocks.phases[0]
        accumulate(parts.objective, rows, phase, 0)
        with torch.no_grad():
            for parameter in parts.model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        figures = accumulate(parts.objective, rows, phase, 1)
        assert figures["reward_margin"] != 0.0
        assert figures["margin_variance"] > 0.0


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda base: dpo(base, lora=LORA), "freeze_embeddings"),
        (
            lambda base: stage_recipe(base / "diffusion", base / "pairs.jsonl", objective={"kind": "preference"}, micro_rows=1),
            "even",
        ),
    ],
)
def test_recipes_that_contradict_themselves(base: Path, make: Any, name: str) -> None:
    with refused(ConfigError, name):
        make(base)


@pytest.mark.parametrize("key", ["complementary", "cuts", "cap", "mask_noise_steps", "parent_kl"])
def test_preferences_have_no_keys_of_other_objectives(base: Path, key: str) -> None:
    values = dpo(base).model_dump(mode="json")
    assert parse_recipe(values, "test").objective.kind == "preference"
    with refused(ConfigError, f"objective.{key}"):
        parse_recipe(values | {"objective": values["objective"] | {key: 1}}, "test")


def test_a_dense_model_has_no_router_to_set(base: Path) -> None:
    with refused(ConfigError, "routed experts"):
        build_components(sft(base, router={"policy": "bias"}))


def test_adapters_leave_routers_alone(base: Path) -> None:
    recipe = tiny_recipe(base / "mixture", base / "chats.jsonl", lora={"rank": 2}, router={"policy": "bias"})
    with refused(ConfigError, "frozen"):
        build_components(recipe)
    allowed = build_components(tiny_recipe(base / "mixture", base / "chats.jsonl", lora={"rank": 2}))
    assert allowed.router is not None
    assert allowed.router.policy == "frozen"


def test_a_mixture_logs_its_loads_and_moves_its_bias(base: Path, tmp_path: Path) -> None:
    run_recipe(mixture(base, "bias"), tmp_path / "run")
    train = [record for record in untimed_records(tmp_path / "run") if record["kind"] == "train"]
    for record in train:
        assert 1.0 <= record["load_visible"] <= 4.0
        assert 1.0 <= record["load_masked"] <= 4.0
        assert 0.0 <= record["idle_masked"] <= 1.0
    biases = [
        [
            block.mlp.expert_bias
            for block in unmask.load(path, dtype="float32").transformer.blocks
            if hasattr(block.mlp, "expert_bias")
        ]
        for path in (base / "mixture", tmp_path / "run")
    ]
    assert len(biases[0]) == 1
    assert not torch.equal(biases[0][0], biases[1][0])
    assert biases[1][0].dtype == torch.float32


def test_what_does_not_fit_is_reported(base: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    tiny_jsonl(long)
    with long.open("a") as file:
        for _ in range(10):
            file.write('{"prompt": "count", "response": "' + " ".join(str(i) for i in range(90)) + '"}\n')
    result = run_recipe(stage_recipe(base / "diffusion", long), tmp_path / "run")
    assert "cut at the row's end" in result.data
    assert "cut" not in run_recipe(sft(base), tmp_path / "fits").data


def test_the_best_checkpoints_are_kept_beside_the_newest(base: Path, tmp_path: Path) -> None:
    run_recipe(sft(base, eval_every=1, checkpoint_every=1, keep_checkpoints=100, tokens=2500), tmp_path / "run")
    scores = {r["step"]: r["nelbo"] for r in untimed_records(tmp_path / "run") if r["kind"] == "validation"}
    newest = max(scores)
    best = sorted((step for step in scores if step != newest), key=lambda step: scores[step])[:2]
    prune_checkpoints(tmp_path / "run", 3)
    kept = {int(path.name.removeprefix("step-")) for path in list_checkpoints(tmp_path / "run")}
    assert kept == {newest, *best}
    prune_checkpoints(tmp_path / "run", 1)
    assert [int(path.name.removeprefix("step-")) for path in list_checkpoints(tmp_path / "run")] == [newest]
