"""Calibration: rows of text run through a model layer by layer, and its matrices rounded by the inputs that they multiply.

Owns the order: every matrix is rounded for what the rounded ones before it give it. How it is rounded is `rounding`'s. One
layer is in memory at a time, of a mixture one expert. Experts are weighed and not rounded here: how much each input of each
expert counts is little to keep. Gated LoRA takes no part: its rows are not masked.

Source: GPTQ (2210.17323). Departs: a matrix's inputs are those that the rounded matrices before it give, in its layer, too.

Legend: R rows, T tokens, D hidden, H width of all heads, F feed-forward, V outputs, K inputs, N tokens of all rows, E experts,
A active experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.diffusion.masks import block_causal_mask
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.layers import FeedForward, rope_cos_sin, swiglu
from unmask.models.arch.moe import MoE, TokenBlocks, route
from unmask.models.arch.transformer import Block
from unmask.models.native.quantize import GroupedMatrix, GroupGrid, round_to
from unmask.models.native.rounding import Gptq, fit_grid
from unmask.models.weights.checkpoint import ModelParts

_CHUNK = 8
"""Rows that are in a forward."""
_WIDEST = 8192
"""Inputs of a matrix for which GPTQ is tried: its memory grows with their square."""
_MASKED = 0.5
"""Share of tokens that are masked in every second row for a model that denoises."""
_BLOCK = 32
"""Block size of a model that names none."""
_SHARED = 0.01
"""Share of all tokens' mean square in what an input counts for an expert, which few tokens may reach."""
_EXPERTS = (".mlp.gate_up", ".mlp.down")


class Calibration:
    """Rounds the layers of a model one after the other.

    Args:
        parts: of the model; what a layer's forward needs is loaded while it is calibrated.
        tokens_RT: ids of the text.
        width: bits of a matrix by its packed name; those that have 4 are rounded here.
        uses_gptq: or least squares alone, weighted by mean square inputs.

    Attributes:
        hidden_RTD: the text before the next layer.
        rounded: the matrices of the last layer, by packed name.
        importance: of the inputs of the last layer's experts [E, K], by packed name.
    """

    def __init__(self, parts: ModelParts, tokens_RT: Tensor, width: Callable[[str], int], *, uses_gptq: bool = True) -> None:
        config = parts.model.config
        self._parts, self._width, self._uses_gptq = parts, width, uses_gptq
        length, block_size = tokens_RT.shape[1], 1
        if config.mask_id is not None and config.gated_lora_rank is None:
            block_size = config.block_size or _BLOCK
            draws_RT = torch.rand(tokens_RT.shape, generator=torch.Generator().manual_seed(0))
            is_masked_RT = (draws_RT < _MASKED) & (torch.arange(len(tokens_RT)) % 2 == 1)[:, None]
            tokens_RT = tokens_RT.masked_fill(is_masked_RT, config.mask_id)
        self._attend = DenseAttend(block_causal_mask(length, length, block_size)[None])
        # Every row begins a block; only block routing asks.
        in_row = -(-length // block_size)
        number_RT = torch.arange(len(tokens_RT))[:, None] * in_row + torch.arange(length) // block_size
        self._blocks = TokenBlocks(number_RT.flatten(), len(tokens_RT) * in_row)
        self._rope = rope_cos_sin(torch.arange(length)[None], parts.model.inv_freq, parts.model.rope_factor, torch.float32)
        used, places_RT = tokens_RT.unique(return_inverse=True)
        embedded = [parts.read("embed.weight", (slice(token, token + 1),)) for token in used.tolist()]
        self.hidden_RTD = torch.cat(embedded).float()[places_RT]
        self.rounded: dict[str, GroupedMatrix] = {}
        self.importance: dict[str, Tensor] = {}

    @torch.no_grad()
    def next_layer(self, number: int) -> None:
        """Round the matrices of a layer; the text moves on through them."""
        prefix = f"blocks.{number}."
        self.rounded, self.importance = {}, {}
        block = self._load(prefix)
        attention, mlp = block.attention, block.mlp
        self._round(f"{prefix}qkv", attention.qkv, lambda: (block.attention_norm(x) for x in self._chunks()))
        heads_RTH = torch.cat([self._heads(block, x) for x in self._chunks()])
        self._round(f"{prefix}out", attention.out, lambda: iter(heads_RTH.split(_CHUNK)))
        for x, heads in zip(self._chunks(), heads_RTH.split(_CHUNK), strict=True):
            x += attention.out(heads)
        normed_RTD = torch.cat([block.mlp_norm(x) for x in self._chunks()])
        if isinstance(mlp, MoE):
            if mlp.shared is not None:
                self._feed_forward(f"{prefix}shared.", mlp.shared, normed_RTD)
            self._experts(prefix, mlp, normed_RTD)
        else:
            assert isinstance(mlp, FeedForward)
            self._feed_forward(prefix, mlp, normed_RTD)
        block.to("meta")

    def _load(self, prefix: str) -> Block:
        """A layer in float32, without experts."""
        block = self._parts.model.blocks[int(prefix.split(".")[1])]
        assert isinstance(block, Block)
        is_routed = isinstance(block.mlp, MoE)
        for name in self._parts.shapes:
            if name.startswith(prefix) and not (is_routed and name.endswith(_EXPERTS)):
                owner, _, last = name.removeprefix(prefix).rpartition(".")
                module, tensor = block.get_submodule(owner), self._parts.read(name).float()
                if last in dict(module.named_buffers(recurse=False)):
                    module.register_buffer(last, tensor)
                else:
                    setattr(module, last, nn.Parameter(tensor, requires_grad=False))
        return block

    def _chunks(self) -> Iterator[Tensor]:
        return iter(self.hidden_RTD.split(_CHUNK))

    def _heads(self, block: Block, x_RTD: Tensor) -> Tensor:
        """What the output projection of attention reads [R, T, H]."""
        heads = self._attend(block.layer, *block.attention.project(block.attention_norm(x_RTD), *self._rope))
        return heads.transpose(1, 2).flatten(2)

    def _feed_forward(self, prefix: str, mlp: FeedForward, normed_RTD: Tensor) -> None:
        def gated(x: Tensor) -> Tensor:
            return swiglu(mlp.gate_up(x))

        self._round(f"{prefix}gate_up", mlp.gate_up, lambda: iter(normed_RTD.split(_CHUNK)))
        self._round(f"{prefix}down", mlp.down, lambda: (gated(x) for x in normed_RTD.split(_CHUNK)))
        for x, normed in zip(self._chunks(), normed_RTD.split(_CHUNK), strict=True):
            x += mlp.down(gated(normed))

    def _experts(self, prefix: str, mlp: MoE, normed_RTD: Tensor) -> None:
        """Weigh the inputs of every expert by the tokens that are routed to it, and add what the experts say."""
        x_ND, out_ND = normed_RTD.flatten(0, 1), self.hidden_RTD.flatten(0, 1)
        weights_NA, indices_NA = route(mlp.router_logits(x_ND), mlp.expert_bias, mlp.moe, self._blocks)
        experts, hidden = mlp.moe.num_experts, x_ND.shape[1]
        of_gate_up, of_down = torch.zeros(experts, hidden), torch.zeros(experts, mlp.moe.expert_size)
        for expert in range(experts):
            rows, places = (indices_NA == expert).nonzero(as_tuple=True)
            if len(rows):
                gate_up, down = (self._parts.read(f"{prefix}mlp.{name}", (expert,)).float() for name in ("gate_up", "down"))
                gated = swiglu(F.linear(x_ND[rows], gate_up))
                of_gate_up[expert], of_down[expert] = x_ND[rows].square().sum(0), gated.square().sum(0)
                out_ND.index_add_(0, rows, F.linear(gated, down) * weights_NA[rows, places, None])
        for name, squares_EK in (("gate_up", of_gate_up), ("down", of_down)):
            self.importance[f"{prefix}experts.{name}.base"] = squares_EK + squares_EK.mean(0) * _SHARED

    def _round(self, name: str, layer: nn.Linear, inputs: Callable[[], Iterator[Tensor]]) -> None:
        """Round the matrix of a layer, which goes on with the rounded one."""
        if self._width(f"{name}.base") != 4:
            return
        weight_VK, size = layer.weight.detach(), layer.in_features
        if self._uses_gptq and size <= _WIDEST:
            hessian_KK = torch.zeros(size, size)
            for x in inputs():
                rows = x.reshape(-1, size)
                hessian_KK.addmm_(rows.T, rows)
            matrix = Gptq(hessian_KK)(weight_VK)
        else:
            squares_K = torch.zeros(size)
            for x in inputs():
                squares_K += x.reshape(-1, size).square().sum(0)
            matrix = round_to(weight_VK, fit_grid(weight_VK, squares_K))
        self.rounded[f"{name}.base"] = matrix
        layer.weight = nn.Parameter(matrix.dequantize(), requires_grad=False)

    def rounding(self, name: str, rows_TK: Tensor, first: int) -> GroupedMatrix | None:
        """Rows of a matrix of the last layer, rounded; None: of one that was not calibrated. See `packing.Rounding`."""
        if name in self.rounded:
            matrix, part = self.rounded[name], slice(first, first + len(rows_TK))
            grid = matrix.grid
            return GroupedMatrix(
                matrix.codes_NK[part], GroupGrid(grid.unit_N[part], grid.multiple_NG[part], grid.zero_NG[part])
            )
        if name in self.importance:
            return round_to(rows_TK, fit_grid(rows_TK, self.importance[name][first // len(rows_TK)]))
        return None
