"""Weights of a sharded model: divided on the meta device, it is filled by each rank with its own slices of the files.

Owns the order of these. No rank ever holds more than its shards and one slice of a tensor.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Transformer
from unmask.models.weights.checkpoint import embedding_row, fill_parameters
from unmask.train.parallel.placement import boxed, reorderings
from unmask.train.parallel.world import World
from unmask.train.passes import Pipeline


@torch.no_grad()
def load_shards(
    model: Transformer, folder: Path, stored_config: ModelConfig, world: World, device: str, pipeline: Pipeline | None
) -> None:
    """Give a divided model on the meta device its weights, in place.

    Args:
        model: after `parallelize`. What no file holds (adapters) is real already.
        folder: of the model's weights.
        stored_config: of the model in the folder, whose vocabulary may be smaller.
        world: the ranks.
        device: where the weights go.
        pipeline: what `parallelize` returned.
    """

    def real(tensor: Tensor) -> Tensor:
        # Zeros: tensor parallelism pads the vocabulary with them.
        return torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.detach().clone()

    if pipeline is None:
        model._apply(real)  # type: ignore[no-untyped-call]
    else:
        pipeline.apply(real)
    orders = reorderings(model, world)
    own = {name: tensor.detach() for name, tensor in model.state_dict().items() if not tensor.is_meta}
    parameters = {name: boxed(tensor, orders.get(name)) for name, tensor in own.items()}
    fill_parameters(folder, stored_config, parameters)
    if "mask_vector" in parameters and stored_config.gated_lora_rank is None:
        assert model.config.mask_id is not None
        row = embedding_row(folder, stored_config, model.config.mask_id)
        for (start,), box in parameters["mask_vector"].boxes:
            box.copy_(row[start : start + len(box)])
