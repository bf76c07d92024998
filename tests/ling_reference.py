"""The Ling 2.0 architecture (bailing_moe_v2, llada2_moe) written once more, slowly: tokens, heads and experts in Python loops.

Reads tensors under their names on disk, computes in float64 numpy, and shares no code with the package.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Reference:
    """One document through the model of `hf` with the tensors `disk`, token by token."""

    def __init__(self, hf: dict[str, Any], disk: dict[str, torch.Tensor], visible: NDArray[np.bool_]) -> None:
        self.hf = hf
        self.disk = {name: tensor.double().numpy() for name, tensor in disk.items()}
        self.visible = visible
        self.chosen: list[set[int]] = []
        self.frequencies, self.rope_scale = frequencies(hf)

    def logits(self, tokens: list[int]) -> Array:
        states = [self.disk["model.word_embeddings.weight"][token] for token in tokens]
        for layer in range(self.hf["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            mixed = self.attention(name, [self.norm(x, f"{name}.input_layernorm") for x in states])
            states = [x + a for x, a in zip(states, mixed, strict=True)]
            normed = [self.norm(x, f"{name}.post_attention_layernorm") for x in states]
            dense = layer < self.hf["first_k_dense_replace"]
            if dense:
                outputs = [self.swiglu(f"{name}.mlp", n) for n in normed]
            else:
                open_to = self.open_experts(f"{name}.mlp", normed)
                outputs = [self.experts(f"{name}.mlp", n, eligible) for n, eligible in zip(normed, open_to, strict=True)]
            states = [x + y for x, y in zip(states, outputs, strict=True)]
        return np.stack([self.disk["lm_head.weight"] @ self.norm(x, "model.norm") for x in states])

    def norm(self, x: Array, name: str) -> Array:
        return x / math.sqrt(float(np.mean(x * x)) + self.hf["rms_norm_eps"]) * self.disk[f"{name}.weight"]

    def swiglu(self, name: str, x: Array) -> Array:
        gate, up = self.disk[f"{name}.gate_proj.weight"] @ x, self.disk[f"{name}.up_proj.weight"] @ x
        return self.disk[f"{name}.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)

    def scores(self, name: str, x: Array) -> tuple[Array, Array]:
        """Of every expert: the score that weighs it, and the biased one that chooses it."""
        scores = 1 / (1 + np.exp(-(self.disk[f"{name}.gate.weight"] @ x)))
        return scores, scores + self.disk[f"{name}.gate.expert_bias"]

    def open_experts(self, name: str, inputs: list[Array]) -> list[list[int]]:
        """The experts among which each token chooses: those of its best groups, or with block routing those of its block."""
        hf = self.hf
        biased = [self.scores(name, x)[1] for x in inputs]
        if not hf.get("expert_capacity"):
            return [self.best_groups(scores) for scores in biased]
        open_to = []
        for index in range(len(inputs)):
            start = index // hf["block_size"] * hf["block_size"]
            best = np.max(biased[start : start + hf["block_size"]], axis=0)
            open_to.append(sorted(range(hf["num_experts"]), key=lambda e: -best[e])[: hf["expert_capacity"]])
        return open_to

    def best_groups(self, biased: Array) -> list[int]:
        hf = self.hf
        per_group = hf["num_experts"] // hf["n_group"]
        groups = [range(g * per_group, (g + 1) * per_group) for g in range(hf["n_group"])]
        worth = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in groups]
        best = sorted(range(hf["n_group"]), key=lambda g: -worth[g])[: hf["topk_group"]]
        return [expert for g in best for expert in groups[g]]

    def experts(self, name: str, x: Array, eligible: list[int]) -> Array:
        hf = self.hf
        scores, biased = self.scores(name, x)
        chosen = sorted(eligible, key=lambda e: -biased[e])[: hf["num_experts_per_tok"]]
        self.chosen.append(set(chosen))
        total = sum(scores[e] for e in chosen)
        out = self.swiglu(f"{name}.shared_experts", x)
        for e in chosen:
            out = out + scores[e] / total * hf["routed_scaling_factor"] * self.swiglu(f"{name}.experts.{e}", x)
        return out

    def attention(self, name: str, inputs: list[Array]) -> list[Array]:
        heads, groups, size = (self.hf[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        fused = [self.disk[f"{name}.attention.query_key_value.weight"] @ x for x in inputs]
        split = [row.reshape(heads + 2 * groups, size) for row in fused]
        outputs = []
        for position in range(len(inputs)):
            merged = []
            for head in range(heads):
                group = head // (heads // groups)
                query = self.rotate(self.norm(split[position][head], f"{name}.attention.query_layernorm"), position)
                seen = [k for k in range(len(inputs)) if self.visible[position, k]]
                weights, values = [], []
                for k in seen:
                    key = self.rotate(self.norm(split[k][heads + group], f"{name}.attention.key_layernorm"), k)
                    weights.append(math.exp(float(query @ key) / math.sqrt(size)))
                    values.append(split[k][heads + groups + group])
                merged.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
            outputs.append(self.disk[f"{name}.attention.dense.weight"] @ np.concatenate(merged))
        return outputs

    def rotate(self, x: Array, position: int) -> Array:
        """Dimension i of the first half of the rotating part turns with dimension i of its second half."""
        half = len(self.frequencies)
        out = x.copy()
        for i, frequency in enumerate(self.frequencies):
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            out[i] = (x[i] * cos - x[i + half] * sin) * self.rope_scale
            out[i + half] = (x[i + half] * cos + x[i] * sin) * self.rope_scale
        return out


def frequencies(hf: dict[str, Any]) -> tuple[list[float], float]:
    """Radians per position of each rotating pair, and YaRN's factor on cosine and sine."""
    size = int(hf["head_dim"] * hf["partial_rotary_factor"])
    plain = [hf["rope_theta"] ** (-2 * i / size) for i in range(size // 2)]
    if hf["rope_scaling"] is None:
        return plain, 1.0
    factor, original = hf["rope_scaling"]["factor"], hf["rope_scaling"]["original_max_position_embeddings"]

    def pair_turning(times: float) -> float:
        return size * math.log(original / (times * 2 * math.pi)) / (2 * math.log(hf["rope_theta"]))

    low, high = max(math.floor(pair_turning(32)), 0), min(math.ceil(pair_turning(1)), size - 1)
    mixed = []
    for i, frequency in enumerate(plain):
        slowed = min(max((i - low) / (high - low), 0.0), 1.0)
        mixed.append(frequency * (1 - slowed) + frequency / factor * slowed)
    return mixed, 0.1 * math.log(factor) + 1
