"""Which recipe makes 8- and 4-bit weights good enough: agreement and perplexity of weights rounded in PyTorch, without kernels.

    python scripts/quantization_study.py [--model smollm2-135m-diffusion] [--recipes int4] [--answers 24] [--calibration 32]

A recipe says how the matrices of layers and the head are rounded, whether hidden states are rotated first, and how activations
are rounded. It is measured against the weights as they are, teacher-forced, on held-out answers of the embedded model and on
prose; of a model with gated LoRA the autoregressive parent is measured. Rounded weights are kept as floats: what is measured is
rounding alone.

The embedded base is a 4-bit model itself (Q4_1: groups of 32 with a minimum): its own weights lose nothing in that format. A
fine-tuned model and a rotated one have left that grid.

Source: GPTQ (2210.17323) Algorithm 1, here with the Hessian of the float model's inputs (`unmask quantize` takes those of the
model that is rounded so far); QuaRot (2404.00456) for the rotation.

Legend: N outputs, K inputs, G groups, g inputs of a group, T tokens, D hidden.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unmask
from unmask.engine.llm import LanguageModel
from unmask.engine.parent import parent_of
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.layers import FeedForward
from unmask.models.arch.transformer import Block, Transformer
from unmask.models.native.quantize import round_to
from unmask.models.native.rotation import Rotation, mix, mixed_channels
from unmask.models.native.rounding import Gptq, fit_grid

ROOT = Path(__file__).parents[1]
_RATIOS = torch.linspace(0.6, 1.1, 11).tolist()
"""Multiples of the scale at which a group's peak is the largest integer, tried by the least-squares scales."""


@dataclass(frozen=True)
class Rounding:
    """How a matrix is rounded.

    Attributes:
        bits: of an integer; 16: not at all.
        group: inputs that share a scale; 0: all of a row.
        scale: "peak": the largest weight is the largest integer; "squares": least squared error, weighted by `importance`;
            "minimum": the kernels' int4, 4 bits with a scale and a minimum for 32 inputs; "multiple": a row's scale times an
            integer of 1 to 16.
        importance: errors count by the mean square of their input, over the calibration text.
        gptq: errors are made up for by the inputs still to be rounded; for "minimum".
    """

    bits: int
    group: int = 0
    scale: str = "peak"
    importance: bool = False
    gptq: bool = False

    @property
    def bits_per_weight(self) -> float:
        """With float16 scales; a whole row's counts for nothing."""
        if self.bits == 16 or not self.group:
            return self.bits
        return self.bits + {"minimum": 16, "multiple": 8}.get(self.scale, 16) / self.group


@dataclass(frozen=True)
class Recipe:
    """Roundings of a model.

    Attributes:
        layers: of the layers' matrices.
        head: of the vocabulary head.
        others: of the matrices whose names match; the first match counts.
        rotate: hidden states are in a rotated basis, and the feed-forward's channels are mixed.
        activations: bits and group (0: a row) of the inputs of all matrices; None: as they are.
    """

    layers: Rounding
    head: Rounding = Rounding(8)
    others: Mapping[str, Rounding] | None = None
    rotate: bool = False
    activations: tuple[int, int] | None = (8, 0)

    def rounding(self, name: str) -> Rounding:
        """Of a matrix."""
        if name == "head":
            return self.head
        return next((each for pattern, each in (self.others or {}).items() if re.search(pattern, name)), self.layers)


def round_groups(groups_NGg: Tensor, rounding: Rounding, weight_Gg: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The function that rounds groups to the grid that fits `groups_NGg`; `weight_Gg`: how much errors count."""
    top = 2 ** (rounding.bits - 1) - 1
    peak_NG1 = groups_NGg.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    if rounding.scale == "multiple":
        unit = peak_NG1.amax(1, keepdim=True) / (top * 16)
        scale = (peak_NG1 / (top * unit)).ceil().clamp(1, 16) * unit
    elif rounding.scale == "squares":
        scale = _least_squares(groups_NGg, peak_NG1 / (top + 0.5), top, weight_Gg)
    else:
        scale = peak_NG1 / top
    if rounding.group and rounding.scale != "multiple":
        scale = scale.half().float()
        scale = torch.where(scale.abs() < 1e-7, 1e-7, scale)
    return lambda x: (x / scale).round().clamp(-top - 1, top) * scale


def _least_squares(groups_NGg: Tensor, start_NG1: Tensor, top: int, weight_Gg: Tensor | None) -> Tensor:
    """Scales of the least squared error: the best of some multiples, with either sign, then refined for its integers."""
    weight = torch.ones(()) if weight_Gg is None else weight_Gg
    # With the negative scale the one integer that has no counterpart is on the other side.
    best, least = start_NG1, torch.full_like(start_NG1, math.inf)
    for ratio in [sign * ratio for ratio in _RATIOS for sign in (1, -1)]:
        q = (groups_NGg / (start_NG1 * ratio)).round().clamp(-top - 1, top)
        scale = (weight * groups_NGg * q).sum(-1, keepdim=True) / (weight * q * q).sum(-1, keepdim=True).clamp_min(1e-12)
        error = (weight * (groups_NGg - q * scale).square()).sum(-1, keepdim=True)
        is_better = (error < least) & (scale.abs() > 1e-7)
        best, least = torch.where(is_better, scale, best), torch.where(is_better, error, least)
    return best


def round_matrix(weight_NK: Tensor, rounding: Rounding, hessian_KK: Tensor | None) -> Tensor:
    """The matrix as it is after rounding; `hessian_KK`: of its inputs, where the rounding asks for it."""
    if rounding.bits == 16:
        return weight_NK
    group = rounding.group or weight_NK.shape[1]
    weight_Gg = None
    if rounding.importance:
        assert hessian_KK is not None
        weight_Gg = hessian_KK.diagonal().unflatten(0, (-1, group))
    if rounding.scale == "minimum":
        if rounding.gptq:
            assert hessian_KK is not None
            return Gptq(hessian_KK)(weight_NK).dequantize()
        return round_to(weight_NK, fit_grid(weight_NK, None if weight_Gg is None else weight_Gg.flatten())).dequantize()
    groups = weight_NK.unflatten(1, (-1, group))
    return round_groups(groups, rounding, weight_Gg)(groups).flatten(1)


def round_activations(x: Tensor, bits: int, group: int) -> Tensor:
    """Symmetric rounding of rows, or of groups of a row."""
    groups = x.unflatten(-1, (-1, group or x.shape[-1]))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
    rounded: Tensor = (groups / scale).round() * scale
    return rounded.flatten(-2)


class Study:
    """A model in both bases, its texts and what its matrices read.

    Args:
        model: autoregressive, dense, float32.
        texts: ids and the first predicted position of each.
        calibration: further ids.
    """

    def __init__(self, model: Transformer, texts: Sequence[tuple[Tensor, int]], calibration: Sequence[Tensor]) -> None:
        self._models = {False: model, True: rotated(model)}
        self._texts, self._calibration = texts, calibration
        self._hessians: dict[bool, dict[str, Tensor]] = {}
        self.reference = self._predict(model)

    def hessians(self, rotate: bool) -> dict[str, Tensor]:
        """Mean of x x^T over the calibration text, of the inputs x of every matrix."""
        if rotate not in self._hessians:
            sums: dict[str, Tensor] = {}

            def watch(name: str, x_TK: Tensor) -> Tensor:
                rows = x_TK.reshape(-1, x_TK.shape[-1])
                sums[name] = sums.get(name, torch.zeros(())) + rows.T @ rows / 1000
                return x_TK

            with inputs_changed(self._models[rotate], watch):
                for ids in self._calibration:
                    head_logits(self._models[rotate], hidden_of(self._models[rotate], ids)[-1:], watch)
            self._hessians[rotate] = sums
        return self._hessians[rotate]

    def measure(self, recipe: Recipe) -> tuple[float, float, float]:
        """Share of equal likeliest tokens, relative change of perplexity, and mean Kullback-Leibler divergence in nats."""
        model, weights = deepcopy(self._models[recipe.rotate]), [recipe.layers, recipe.head, *(recipe.others or {}).values()]
        needs_inputs = any(each.gptq or each.importance for each in weights)
        hessians = self.hessians(recipe.rotate) if needs_inputs else {}
        if model.lm_head is None:
            model.lm_head = nn.Linear(1, 1, bias=False)
            model.lm_head.weight = nn.Parameter(model.embed.weight.detach().clone())
        for name, layer in matrices(model).items():
            rounding = recipe.rounding(name)
            rounding = replace(rounding, gptq=rounding.gptq and name != "head")
            layer.weight = nn.Parameter(round_matrix(layer.weight.detach(), rounding, hessians.get(name)))

        def change(name: str, x: Tensor) -> Tensor:
            return x if recipe.activations is None else round_activations(x, *recipe.activations)

        with inputs_changed(model, change):
            found = self._predict(model, change)
        pairs = list(zip(found, self.reference, strict=True))
        same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in pairs]).float().mean().item()
        targets = [ids[first:] for ids, first in self._texts]
        losses = [
            torch.cat([F.nll_loss(each, target, reduction="none") for each, target in zip(all_, targets, strict=True)]).mean()
            for all_ in (found, self.reference)
        ]
        divergence = torch.cat([(b.exp() * (b - a)).sum(-1) for a, b in pairs]).mean().item()
        return same, math.exp((losses[0] - losses[1]).item()) - 1, divergence

    def _predict(self, model: Transformer, change: Callable[[str, Tensor], Tensor] = lambda name, x: x) -> list[Tensor]:
        """Log-probabilities of every predicted token."""
        return [head_logits(model, hidden_of(model, ids)[first - 1 : -1], change).log_softmax(-1) for ids, first in self._texts]


def layer_matrices(model: Transformer) -> dict[str, nn.Linear]:
    """The matrices of the layers, by name."""
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and name != "lm_head"}


def matrices(model: Transformer) -> dict[str, nn.Linear]:
    """The matrices that are rounded, by name, without the head of a tied model."""
    found = layer_matrices(model)
    return found if model.lm_head is None else {**found, "head": model.lm_head}


@contextmanager
def inputs_changed(model: Transformer, change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Inside, the inputs of every layer's matrices are what `change` makes of them; mixed channels are mixed before."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        count = mixed_channels(model.config.ffn_size) if model.config.hf_extras.get("mixed") and name.endswith("down") else 1
        return lambda module, arguments: (change(name, mix(arguments[0], count)), *arguments[1:])

    handles = [each.register_forward_pre_hook(hook(name)) for name, each in layer_matrices(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def hidden_of(model: Transformer, ids_T: Tensor) -> Tensor:
    """Hidden states [T, D] of a causal forward."""
    length = len(ids_T)
    mask = torch.ones(1, length, length, dtype=torch.bool).tril()
    hidden: Tensor = model(ids_T[None], torch.arange(length)[None], DenseAttend(mask))[0]
    return hidden


@torch.inference_mode()
def head_logits(model: Transformer, hidden_TD: Tensor, change: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Logits of hidden states that `change` has changed."""
    return model.head(change("head", hidden_TD))


@torch.no_grad()
def rotated(model: Transformer) -> Transformer:
    """The same function in a rotated basis, with mixed channels in the feed-forward, as the kernels have it with 8 bits."""
    other, rotation, count = deepcopy(model), Rotation(model.config.hidden_size), mixed_channels(model.config.ffn_size)
    head = model.head_weight.detach()
    for block in other.blocks:
        assert isinstance(block, Block)
        assert isinstance(block.mlp, FeedForward)
        attention, mlp = block.attention, block.mlp
        for layer, norm in ((attention.qkv, block.attention_norm), (mlp.gate_up, block.mlp_norm)):
            layer.weight.copy_(rotation.inputs(layer.weight, norm.weight))
            norm.weight.fill_(1.0)
        attention.out.weight.copy_(rotation.outputs(attention.out.weight))
        mlp.down.weight.copy_(rotation.outputs(mix(mlp.down.weight, count) / count))
    other.lm_head = nn.Linear(1, 1, bias=False)
    other.lm_head.weight = nn.Parameter(rotation.inputs(head, other.norm.weight))
    other.norm.weight.fill_(1.0)
    other.embed.weight.copy_(rotation(other.embed.weight))
    other.config = replace(other.config, tied_head=False, hf_extras={"mixed": True})
    return other


def recipes() -> dict[str, Recipe]:
    """The recipes that are compared, by name."""
    eight, full = Rounding(8), Rounding(16)
    best, squares = Rounding(4, 32, "minimum", gptq=True), Rounding(4, 32, "squares")
    ends = {r"blocks\.(0|29)\.": eight}
    down = {r"down": Rounding(8, 32)}
    return {
        "int8 row (today)": Recipe(eight, rotate=True),
        "int8 row, not rotated": Recipe(eight),
        "int8 row, activations as they are": Recipe(eight, rotate=True, activations=None),
        "activations of 8 bits by row alone": Recipe(full, full, rotate=True),
        "activations of 8 bits by 32 alone": Recipe(full, full, rotate=True, activations=(8, 32)),
        "activations of 8 bits by 32 alone, not rotated": Recipe(full, full, activations=(8, 32)),
        "int8 group 32, activations by 32": Recipe(Rounding(8, 32), Rounding(8, 32), rotate=True, activations=(8, 32)),
        "int8 row, activations of 12 bits": Recipe(eight, rotate=True, activations=(12, 0)),
        "int8 row, activations of 16 bits": Recipe(eight, rotate=True, activations=(16, 0)),
        "int8 group 32, activations of 16 bits": Recipe(Rounding(8, 32), Rounding(8, 32), rotate=True, activations=(16, 0)),
        "int8 squares 32, activations by 32, not rotated": Recipe(
            Rounding(8, 32, "squares"), Rounding(8, 32, "squares"), activations=(8, 32)
        ),
        "int4 multiple 32": Recipe(Rounding(4, 32, "multiple")),
        "int4 multiple 32, activations as they are": Recipe(Rounding(4, 32, "multiple"), activations=None),
        "int4 row": Recipe(Rounding(4), activations=None),
        "int4 peak 64": Recipe(Rounding(4, 64), activations=None),
        "int4 peak 32": Recipe(Rounding(4, 32), activations=None),
        "int4 minimum 32": Recipe(Rounding(4, 32, "minimum"), activations=None),
        "int4 minimum 32, rotated": Recipe(Rounding(4, 32, "minimum"), rotate=True, activations=None),
        "int4 squares 32": Recipe(squares, activations=None),
        "int4 squares 32, rotated": Recipe(squares, rotate=True, activations=None),
        "int4 squares 32, importance": Recipe(replace(squares, importance=True), activations=None),
        "int4 gptq 32": Recipe(best, activations=None),
        "int4 gptq 32, rotated": Recipe(best, rotate=True, activations=None),
        "int4 gptq 32, rotated, ends in 8 bits": Recipe(best, others=ends, rotate=True, activations=None),
        "int4 gptq 32, rotated, down in 8 bits": Recipe(best, others=down, rotate=True, activations=None),
        "int4 minimum 32, importance": Recipe(replace(best, gptq=False, importance=True), activations=None),
        "int4 gptq 32, activations by 32": Recipe(best, activations=(8, 32)),
        "int4 gptq 32, down in 8 bits": Recipe(best, others=down, activations=None),
        "int4 gptq 32, rotated, activations by 32": Recipe(best, rotate=True, activations=(8, 32)),
        "int4 gptq 32, rotated, activations by row": Recipe(best, rotate=True),
    }


def texts_of(model: LanguageModel, num_answers: int, num_calibration: int) -> tuple[list[tuple[Tensor, int]], list[Tensor]]:
    """Held-out answers and prose with the first predicted position of each, and other answers to calibrate with."""
    lines = (ROOT / "scripts" / "embedded" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines[:: max(len(lines) // (num_answers + num_calibration), 1)]]
    encoded = []
    for pair in pairs:
        ids = model.encode_chat([{"role": "user", "content": pair["prompt"]}])
        answer = model.encode_prompt(pair["response"], chat=False)
        encoded.append((torch.tensor([*ids, *answer][:192]), len(ids)))
    prose = torch.tensor(model.encode_prompt((ROOT / "docs" / "concepts.md").read_text(encoding="utf-8"), chat=False))
    windows = [(each, 32) for each in prose[: max(num_answers // 4, 1) * 128].split(128)]
    return [*encoded[:num_answers], *windows], [ids for ids, _ in encoded[num_answers : num_answers + num_calibration]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-diffusion")
    parser.add_argument("--recipes", default="", help="those whose names match this regular expression")
    parser.add_argument("--answers", type=int, default=24, help="that are measured")
    parser.add_argument("--calibration", type=int, default=32, help="other answers to calibrate with")
    options = parser.parse_args(argv)
    model = unmask.load(options.model, dtype="float32", quantize="none")
    if model.config.gated_lora_rank is not None:
        model = parent_of(model, unmask.load(options.model, dtype="float32", quantize="none").tokenizer).model
    texts, calibration = texts_of(model, options.answers, options.calibration)
    study = Study(model.transformer, texts, calibration)
    count = sum(len(ids) - first for ids, first in texts)
    print(f"{options.model}: {count} tokens; bits of a layer's weight, same likeliest token, perplexity, divergence")
    for name, recipe in recipes().items():
        if re.search(options.recipes, name):
            same, change, divergence = study.measure(recipe)
            bits = recipe.layers.bits_per_weight
            print(f"| {name} | {bits:.2f} | {same:.1%} | {change:+.1%} | {divergence:.4f} |", flush=True)


if __name__ == "__main__":
    main()
