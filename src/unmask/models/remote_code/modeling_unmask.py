# Copyright 2026 The unmask authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the
# License. You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific
# language governing permissions and limitations under the License.
"""A block-diffusion language model exported by unmask: logits, and decoding block by block.

Runs dense models and mixtures of experts, with the tensor names of Llama and of Ling 2.0. Needs torch and transformers only.

Legend: B batch, T query tokens, K key tokens, D hidden, H query heads, G kv heads, S head dim, N rows, E experts, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_unmask import UnmaskConfig, rope_frequencies

Cache = list[tuple[Tensor, Tensor]]
"""Rotated keys and values [B, G, K, S] of each layer."""


class UnmaskRMSNorm(nn.Module):
    """Root-mean-square norm, statistics in at least float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)


class GatedLora(nn.Module):
    """The low-rank update of a linear layer's output, for noisy rows alone. Its parameters are called `in` and `out`."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.register_parameter("in", nn.Parameter(torch.zeros(rank, inputs)))
        self.register_parameter("out", nn.Parameter(torch.zeros(outputs, rank)))

    def forward(self, x_BTD: Tensor, noisy_T: Tensor) -> Tensor:
        low = F.linear(x_BTD, self.get_parameter("in")) * noisy_T[:, None]
        return F.linear(low, self.get_parameter("out"))


class GatedLayer(nn.Module):
    """The gated LoRA of one decoder layer, whose projections it sees as fused ones."""

    def __init__(self, config: UnmaskConfig, rank: int) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.intermediate_size
        heads = config.num_attention_heads * config.head_dim
        qkv = heads + 2 * config.num_key_value_heads * config.head_dim
        self.attention = nn.ModuleDict({"qkv": GatedLora(hidden, qkv, rank), "out": GatedLora(heads, hidden, rank)})
        self.mlp = nn.ModuleDict({"gate_up": GatedLora(hidden, 2 * ffn, rank), "down": GatedLora(ffn, hidden, rank)})


class Gated(nn.Module):
    """The gated LoRA of all layers, and the vector that noisy rows read in place of the mask token's embedding."""

    def __init__(self, config: UnmaskConfig, rank: int) -> None:
        super().__init__()
        self.mask_vector = nn.Parameter(torch.zeros(config.hidden_size))
        self.blocks = nn.ModuleList(GatedLayer(config, rank) for _ in range(config.num_hidden_layers))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading dimensions of each head."""
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    return torch.cat((turning * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)


class UnmaskAttention(nn.Module):
    """Grouped-query attention under a boolean mask."""

    def __init__(self, config: UnmaskConfig) -> None:
        super().__init__()
        about, size = config.remote_code, config.head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, size
        self.names = names = about["attention_names"]
        heads = {"q": self.num_heads, "k": self.num_kv_heads, "v": self.num_kv_heads}
        heads = {"qkv": sum(heads.values())} if "qkv" in names else heads
        self.inputs = [names[part] for part in heads]
        for part, count in heads.items():
            self.add_module(names[part], nn.Linear(config.hidden_size, count * size, bias=about["qkv_bias"]))
        self.add_module(names["out"], nn.Linear(self.num_heads * size, config.hidden_size, bias=about["out_bias"]))
        self.norms = [names["query_norm"], names["key_norm"]] if about["qk_norm"] else []
        for name in self.norms:
            self.add_module(name, UnmaskRMSNorm(size, config.rms_norm_eps))

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], mask_TK: Tensor, past: tuple[Tensor, Tensor] | None,
        gated: Any, noisy_T: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
        """Attention's output, and keys and values of `past` and of these rows."""
        fused = torch.cat([self.get_submodule(name)(x_BTD) for name in self.inputs], dim=-1)
        if gated is not None:
            fused = fused + gated["qkv"](x_BTD, noisy_T)
        heads = fused.view(*x_BTD.shape[:2], -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.norms:
            q, k = (self.get_submodule(name)(part) for name, part in zip(self.norms, (q, k), strict=True))
        q, k = rotate(q, *rope), rotate(k, *rope)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        groups = self.num_heads // self.num_kv_heads
        keys, values = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask_TK)
        merged = out.transpose(1, 2).reshape(*x_BTD.shape[:2], -1)
        result = self.get_submodule(self.names["out"])(merged)
        if gated is not None:
            result = result + gated["out"](merged, noisy_T)
        return result, (k, v)


class UnmaskMLP(nn.Module):
    """SwiGLU feed-forward: a dense layer's, or one expert."""

    def __init__(self, hidden: int, ffn: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn, bias=bias)
        self.up_proj = nn.Linear(hidden, ffn, bias=bias)
        self.down_proj = nn.Linear(ffn, hidden, bias=bias)

    def forward(self, x: Tensor, gated: Any = None, noisy_T: Tensor | None = None) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gated is None:
            out: Tensor = self.down_proj(F.silu(gate) * up)
            return out
        of_gate, of_up = gated["gate_up"](x, noisy_T).chunk(2, dim=-1)
        inner = F.silu(gate + of_gate) * (up + of_up)
        noisy_out: Tensor = self.down_proj(inner) + gated["down"](inner, noisy_T)
        return noisy_out


class UnmaskRouter(nn.Module):
    """The router of Ling 2.0: sigmoid scores in float32, the best groups, the best experts in them by biased score."""

    def __init__(self, config: UnmaskConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.expert_bias = nn.Parameter(torch.zeros(config.num_experts), requires_grad=False)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the experts of each row, both [N, experts per token]."""
        config, wide = self.config, torch.promote_types(x_ND.dtype, torch.float32)
        scores_NE = F.linear(x_ND.to(wide), self.weight.to(wide)).double().sigmoid().to(wide)
        biased_NE = scores_NE + self.expert_bias.to(wide)
        if config.topk_group < config.n_group:
            grouped = biased_NE.view(len(biased_NE), config.n_group, -1)
            group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            closed = torch.ones_like(group_scores, dtype=torch.bool)
            closed.scatter_(1, _largest(group_scores, config.topk_group), False)
            biased_NE = grouped.masked_fill(closed[..., None], float("-inf")).flatten(1)
        experts = _largest(biased_NE, config.num_experts_per_tok)
        weights = scores_NE.gather(1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * config.routed_scaling_factor, experts


def _largest(x: Tensor, count: int) -> Tensor:
    """Indices of the largest numbers of each row, the lowest of equals first."""
    return x.sort(dim=-1, descending=True, stable=True).indices[:, :count]


class UnmaskMoE(nn.Module):
    """Mixture of experts: routed experts, and shared ones that every token takes."""

    def __init__(self, config: UnmaskConfig) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.moe_intermediate_size
        self.gate = UnmaskRouter(config)
        self.experts = nn.ModuleList(UnmaskMLP(hidden, ffn) for _ in range(config.num_experts))
        self.shared_experts = UnmaskMLP(hidden, ffn * config.num_shared_experts) if config.num_shared_experts else None

    def forward(self, x_BTD: Tensor, gated: Any = None, noisy_T: Tensor | None = None) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        weights, chosen = self.gate(x_ND)
        out_ND = torch.zeros_like(x_ND, dtype=weights.dtype)
        for expert in chosen.unique().tolist():
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            out_ND.index_add_(0, rows, self.experts[expert](x_ND[rows]) * weights[rows, places, None])
        result = out_ND.to(x_ND.dtype)
        if self.shared_experts is not None:
            result = result + self.shared_experts(x_ND)
        return result.view_as(x_BTD)


class UnmaskLayer(nn.Module):
    """Pre-norm decoder layer."""

    def __init__(self, config: UnmaskConfig, layer: int) -> None:
        super().__init__()
        about, hidden = config.remote_code, config.hidden_size
        self.attention_name = about["attention"]
        self.add_module(about["attention"], UnmaskAttention(config))
        self.input_layernorm = UnmaskRMSNorm(hidden, config.rms_norm_eps)
        self.post_attention_layernorm = UnmaskRMSNorm(hidden, config.rms_norm_eps)
        routed = config.num_experts and layer >= config.first_k_dense_replace
        dense = (hidden, config.intermediate_size, about["mlp_bias"])
        self.mlp = UnmaskMoE(config) if routed else UnmaskMLP(*dense)

    def forward(self, x_BTD: Tensor, rope: Any, mask_TK: Tensor, past: Any, gated: Any, noisy_T: Tensor) -> tuple[Tensor, Any]:
        """The layer's output, and its keys and values."""
        attention = self.get_submodule(self.attention_name)
        of_attention, of_mlp = (None, None) if gated is None else (gated.attention, gated.mlp)
        out, present = attention(self.input_layernorm(x_BTD), rope, mask_TK, past, of_attention, noisy_T)
        x_BTD = x_BTD + out
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD), of_mlp, noisy_T), present


class UnmaskDecoder(nn.Module):
    """Embedding, layers and the final norm, under the names they have on disk."""

    def __init__(self, config: UnmaskConfig) -> None:
        super().__init__()
        self.add_module(config.remote_code["embedding"], nn.Embedding(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(UnmaskLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = UnmaskRMSNorm(config.hidden_size, config.rms_norm_eps)


class UnmaskForCausalLM(PreTrainedModel):  # type: ignore[misc]
    """A block-diffusion model: logits at position p are those of token p, not of the one behind it."""

    config_class = UnmaskConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ("UnmaskLayer",)
    _keep_in_fp32_modules = ("mlp.gate.weight", "expert_bias")
    _keep_in_fp32_modules_strict = ("mlp.gate.weight", "expert_bias")

    def __init__(self, config: UnmaskConfig) -> None:
        super().__init__(config)
        self.model = UnmaskDecoder(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gated = None if config.gated_lora_rank is None else Gated(config, config.gated_lora_rank)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_submodule(self.config.remote_code["embedding"])

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head

    def can_generate(self) -> bool:
        return True

    def _run(self, tokens: Tensor, start: int, past: Cache | None, block_length: int, clean: int) -> tuple[Tensor, Cache]:
        """Hidden states of the tokens from position `start` on, and all keys and values up to their end.

        Args:
            tokens: [B, end], the text from its first token to the last that is run.
            start: the first position to run; `past` holds those before it.
            past: keys and values, or None.
            block_length: positions of a block see each other, and all before them.
            clean: of a shifted model, positions below it are decided: they see only what lies before.
        """
        config, shifted = self.config, self.config.shift_start_token_id is not None
        clean = clean if shifted else 0
        if shifted:
            first = tokens.new_full((len(tokens), 1), config.shift_start_token_id)
            tokens = torch.cat((first, tokens[:, :-1]), dim=1)
        end, read = tokens.shape[1], tokens[:, start:]
        x = self.get_input_embeddings()(read)
        if self.gated is not None:
            x = torch.where(read.eq(config.mask_token_id)[..., None], self.gated.mask_vector, x)
        query, key = torch.arange(start, end, device=x.device), torch.arange(end, device=x.device)
        visible = torch.where(query < clean, query + 1, (query // block_length + 1) * block_length)
        inv_freq, factor = rope_frequencies(config, config.remote_code["rotary_dim"])
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = (query[:, None].to(wide) * inv_freq.to(x.device, wide)).repeat(1, 2)
        rope = ((angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype))
        present = []
        for number, layer in enumerate(self.model.layers):
            gated = None if self.gated is None else self.gated.blocks[number]
            old = None if past is None else past[number]
            x, new = layer(x, rope, key[None] < visible[:, None], old, gated, query >= clean)
            present.append(new)
        return self.model.norm(x), present

    def _head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states."""
        return F.linear(hidden, (self.lm_head or self.get_input_embeddings()).get_parameter("weight"))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, block_length: int | None = None, clean_length: int = 0,
    ) -> CausalLMOutput:  # fmt: skip
        """Logits [B, T, V] of texts of one length, from their first token on, some of them the mask token.

        Args:
            input_ids: [B, T].
            attention_mask: all ones, or None; padding is not supported here (`generate` takes it).
            block_length: None: that of the model.
            clean_length: of a shifted model, how many leading tokens are decided; a multiple of `block_length`.
        """
        if attention_mask is not None and not attention_mask.bool().all():
            raise ValueError("attention_mask has zeros; pass texts of different lengths one by one")
        block_length = block_length or self.config.remote_code["block_length"]
        return CausalLMOutput(logits=self._head(self._run(input_ids, 0, None, block_length, clean_length)[0]))

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *,
        input_ids: Tensor | None = None, attention_mask: Tensor | None = None, max_new_tokens: int | None = None,
        block_length: int | None = None, steps: int | None = None, threshold: float | None = None, temperature: float = 0.0,
        eos_token_id: int | list[int] | None = None, pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Prompts and their answers [B, L], padded at the end; decoded block by block, several tokens a forward.

        Args:
            inputs: prompts [B, T], or `input_ids`.
            generation_config: defaults of the options; None: generation_config.json.
            attention_mask: 0 at padding, on whichever side.
            max_new_tokens: at most so many new tokens; an answer ends earlier with an end token.
            block_length: None: that of the model.
            steps: at most so many forwards a block.
            threshold: every guess more likely than this is taken; of 1, one a forward where `steps` is the block length.
            temperature: 0 takes the most likely token, otherwise guesses are drawn, by the `generator`.
            eos_token_id: tokens that end an answer.
            pad_token_id: fills answers that are shorter than others; default: an end token, or 0.
        """
        given = vars(generation_config or self.generation_config)
        prompts = inputs if inputs is not None else input_ids
        if prompts is None:
            raise ValueError("generate needs prompts: pass inputs or input_ids")
        size = block_length or given.get("block_length") or self.config.remote_code["block_length"]
        ends = eos_token_id if eos_token_id is not None else given.get("eos_token_id")
        end_ids = [ends] if isinstance(ends, int) else list(ends or [])
        steps = steps or min(given.get("steps") or size, size)
        threshold = threshold if threshold is not None else given.get("threshold", 0.95)
        new_tokens = max_new_tokens or given.get("max_new_tokens") or 128
        texts = []
        for row, prompt in enumerate(prompts):
            kept = prompt if attention_mask is None else prompt[attention_mask[row].bool()]
            draw = (temperature, generator)
            answer = self._answer(kept, new_tokens, size, steps, threshold, set(end_ids), draw)
            texts.append(torch.cat((prompt, answer)))
        pad = next((id_ for id_ in (pad_token_id, given.get("pad_token_id"), *end_ids) if id_ is not None), 0)
        return nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad)

    def _answer(
        self, prompt: Tensor, new_tokens: int, size: int, steps: int, threshold: float, end_ids: set[int], draw: Any
    ) -> Tensor:
        """The answer to one prompt [T]: keys and values of finished blocks are kept, the block being decoded is run anew."""
        mask_id, length = self.config.mask_token_id, len(prompt)
        stop = -(-(length + new_tokens) // size) * size
        canvas = torch.cat((prompt, prompt.new_full((stop - length,), mask_id)))[None]
        undecided = torch.arange(stop, device=prompt.device) >= length
        first, past = length // size * size, None
        if first:
            past = self._run(canvas[:, :first], 0, None, size, first)[1]
        for front in range(first, stop, size):
            for step in range(size):
                masked = undecided[front : front + size].nonzero()[:, 0]
                if not len(masked):
                    break
                hidden, _ = self._run(canvas[:, : front + size], front, past, size, front)
                quota = size // steps + (step < size % steps)
                tokens, accepted = self._guess(self._head(hidden[0, masked]), quota, threshold, *draw)
                places = front + masked[accepted]
                canvas[0, places], undecided[places] = tokens[accepted], False
                open_places = undecided.nonzero()[:, 0]
                text = canvas[0, length : open_places[0] if len(open_places) else stop].tolist()[:new_tokens]
                end = next((place for place, token in enumerate(text) if token in end_ids), None)
                if end is not None or len(text) == new_tokens:
                    return prompt.new_tensor(text if end is None else text[: end + 1])
            past = self._run(canvas[:, : front + size], front, past, size, front + size)[1]
        raise AssertionError("a canvas holds all that is to be decided")

    def _guess(self, logits_NV: Tensor, quota: int, threshold: float, temperature: float, draw: Any) -> tuple[Tensor, Tensor]:
        """A token for every masked position, and indices of those that are taken."""
        logits_NV = logits_NV.float()
        logits_NV[:, self.config.mask_token_id] = float("-inf")
        best, tokens = logits_NV.max(-1)
        if temperature > 0.01:
            tokens = torch.multinomial((logits_NV / temperature).softmax(-1), 1, generator=draw)[:, 0]
            best = logits_NV.gather(1, tokens[:, None])[:, 0]
        confidence = (best - logits_NV.logsumexp(-1)).exp()
        above = (confidence > threshold).nonzero()[:, 0]
        enough = len(above) >= min(quota, len(tokens))
        return tokens, above if enough else confidence.sort(descending=True, stable=True).indices[:quota]
