"""Upcycle a dense model to a mixture of experts that says what the dense one says: each expert is a copy of its feed-forward.

    python scripts/upcycle.py smollm2-135m --family bailing_moe_v2 --experts 8 --active 2 --out out/mixture
    python scripts/upcycle.py smollm2-135m-converted --family llada2_moe --groups 4 --shared --noise 0.02 --out out/mixture

Routers are random, so that tokens go to different experts, and the weights of a token's experts sum up to `--routed-scale`,
by which the experts' output matrices are divided. What the dense model computes is changed by rounding alone: of the routing
weights (not where `--active` and `--routed-scale` are powers of two and a large `--router-std` makes the chosen scores equal),
and of products in another order. `--noise` makes the experts differ, for tests of routing: that is another model then.

Source: sparse upcycling (2212.05055), here with scaled experts, so that nothing is to be trained again.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from unmask.data.tokenizer import load_tokenizer
from unmask.errors import ConfigError, UnmaskError
from unmask.models.arch.config import ModelConfig, MoEConfig
from unmask.models.arch.transformer import Transformer
from unmask.models.dtypes import dtype_name, parse_dtype
from unmask.models.families.registry import family_of, read_config, stored_tensors, write_config
from unmask.models.families.tensors import StoredTensor
from unmask.models.weights.checkpoint import GENERATION_CONFIG, parameter_dtype, token_ids
from unmask.models.weights.hub import resolve, tokenizer_folder
from unmask.models.weights.loading import load_model
from unmask.models.weights.safetensors_io import TensorSpec, write_checkpoint

FAMILIES = ("llada2_moe", "bailing_moe_v2")
_SELECTION_BIAS = 0.05
"""Most that a selection bias adds to a score: what decides among experts whose scores are equal."""


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """How a dense model becomes a mixture.

    Attributes:
        family: of the mixture, one of `FAMILIES`.
        num_experts: routed experts of a layer.
        num_active: of a token; at least 2.
        num_groups: that the experts of a layer are in; half of them, at least one, are eligible for a token.
        shared: a shared expert gives half of the output.
        num_dense_layers: first layers that stay as they are.
        routed_scale: what the routing weights of a token sum up to.
        router_std: standard deviation of the router's logits; from some thousands on most scores are 0 or 1, exactly.
        noise: standard deviation of what is added to the experts' weights, relative to that of the weights.
        seed: of routers and noise.
    """

    family: str
    num_experts: int = 8
    num_active: int = 2
    num_groups: int = 1
    shared: bool = False
    num_dense_layers: int = 1
    routed_scale: float = 2.0
    router_std: float = 1.0
    noise: float = 0.0
    seed: int = 0

    def config(self, dense: ModelConfig) -> ModelConfig:
        """The architecture of the mixture made of a dense one.

        Raises:
            ConfigError: the family cannot hold it.
        """
        if self.family not in FAMILIES:
            raise ConfigError(f"family is {self.family!r}; choose one of {', '.join(FAMILIES)}")
        if self.num_active < 2:
            raise ConfigError(f"num_active is {self.num_active}; it must be at least 2: a single weight is not normalised")
        if dense.moe is not None or dense.mlp_bias or dense.gated_lora_rank is not None:
            what = "a mixture already" if dense.moe is not None else "with biases or gated LoRA in its feed-forward"
            raise ConfigError(f"the model is {what}; upcycle a plain dense one (of gated LoRA: unmask export --parent)")
        moe = MoEConfig(
            num_experts=self.num_experts, num_active=self.num_active, expert_size=dense.ffn_size, num_shared=int(self.shared),
            num_groups=self.num_groups, num_active_groups=max(self.num_groups // 2, 1), routed_scale=self.routed_scale,
            num_dense_layers=self.num_dense_layers,
        )  # fmt: skip
        config = replace(dense, family=self.family, moe=moe)
        if config.mask_id is None and family_of(config).token_editing:
            raise ConfigError(
                f"{self.family} is a family of diffusion models, and the model is autoregressive; use bailing_moe_v2"
            )
        return read_config(write_config(config))  # as it will be loaded


class UpcycledTensors:
    """The tensors of a mixture by their names on disk, each made when it is asked for.

    Args:
        model: the dense one.
        upcycling: what becomes of it.
    """

    def __init__(self, model: Transformer, upcycling: Upcycling) -> None:
        self.config = upcycling.config(model.config)
        self._upcycling, self._state = upcycling, model.state_dict()
        self._stored: Mapping[str, StoredTensor] = stored_tensors(self.config)
        dtype = model.embed.weight.dtype
        self.specs = {
            name: TensorSpec(each.shape, parameter_dtype(each.parameter, dtype)) for name, each in self._stored.items()
        }

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """A tensor."""
        tensor, upcycling = self._stored[name], self._upcycling
        layer, _, part = tensor.parameter.partition(".mlp.")
        if tensor.parameter in self._state:
            made = tensor.view(self._state)
        elif part == "router":
            made = self._random(name) * upcycling.router_std / self._state[f"{layer}.mlp_norm.weight"].norm()
        elif part == "expert_bias":
            made = torch.rand(tensor.shape, generator=self._generator(name)) * _SELECTION_BIAS
        elif part.startswith("shared."):
            share = 0.5 if "down" in part else 1.0
            made = self._state[f"{layer}.mlp.{part.removeprefix('shared.')}"][tensor.index] * share
        else:
            weight = self._state[f"{layer}.mlp.{part}.weight"][tensor.index[1:]]
            if upcycling.noise:
                weight = weight + self._random(name) * upcycling.noise * weight.float().std()
            made = weight * self._share if part == "down" else weight
        return made.to(self.specs[name].dtype)

    @property
    def _share(self) -> float:
        """What the experts' output is multiplied by, so that all of a layer's output is the dense one's."""
        return (0.5 if self._upcycling.shared else 1.0) / self._upcycling.routed_scale

    def _random(self, name: str) -> Tensor:
        return torch.randn(self._stored[name].shape, generator=self._generator(name))

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self._upcycling.seed} {name}".encode()))


def upcycled(model: Transformer, upcycling: Upcycling) -> Transformer:
    """The mixture that a dense model becomes, in memory."""
    tensors = UpcycledTensors(model, upcycling)
    mixture = Transformer(tensors.config).to(model.embed.weight.dtype)
    state = mixture.state_dict()
    for name, tensor in stored_tensors(tensors.config).items():
        with torch.no_grad():
            tensor.view(state).copy_(tensors.read(name))
    return mixture.eval()


def upcycle(model: str | Path, out: Path, upcycling: Upcycling, *, dtype: torch.dtype = torch.float32) -> ModelConfig:
    """Write the mixture that a dense model becomes, with its tokenizer, chat template and token ids.

    Args:
        model: as of `load_model`; held in memory once, while the experts are written one by one.
        out: new or empty folder.
        upcycling: what becomes of the model.
        dtype: of the weights.

    Returns:
        The architecture written.

    Raises:
        UnmaskError: there is no such model, its family cannot hold it, or `out` is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; choose another folder")
    folder = resolve(model) if isinstance(model, str) else model
    tensors = UpcycledTensors(load_model(folder, dtype=dtype), upcycling)
    values = write_config(tensors.config, dtype=dtype_name(dtype))
    jsons = {GENERATION_CONFIG: token_ids(tensors.config)}
    write_checkpoint(out, values, tensors.specs, tensors.read, extra_jsons=jsons)
    source = tokenizer_folder(folder)
    if source is not None:
        load_tokenizer(source).save(out)
    return tensors.config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Upcycling(family=FAMILIES[0])
    parser.add_argument("model", help="folder, Hugging Face id or embedded model, dense")
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--experts", type=int, default=defaults.num_experts)
    parser.add_argument("--active", type=int, default=defaults.num_active, help="experts of a token")
    parser.add_argument("--groups", type=int, default=defaults.num_groups, help="half of them are eligible for a token")
    parser.add_argument("--shared", action="store_true", help="a shared expert gives half of the output")
    parser.add_argument("--dense-layers", type=int, default=defaults.num_dense_layers, help="first layers, left as they are")
    parser.add_argument("--routed-scale", type=float, default=defaults.routed_scale)
    parser.add_argument("--router-std", type=float, default=defaults.router_std, help="of the router's logits")
    parser.add_argument(
        "--noise", type=float, default=defaults.noise, help="difference of the experts, relative to their weights"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--dtype", default="float32", help="of the weights")
    options = parser.parse_args()
    upcycling = Upcycling(
        family=options.family, num_experts=options.experts, num_active=options.active, num_groups=options.groups,
        shared=options.shared, num_dense_layers=options.dense_layers, routed_scale=options.routed_scale,
        router_std=options.router_std, noise=options.noise, seed=options.seed,
    )  # fmt: skip
    try:
        config = upcycle(options.model, options.out, upcycling, dtype=parse_dtype(options.dtype))
    except UnmaskError as error:
        sys.exit(f"error: {error}")
    print(f"{options.out}: {config.family}, {options.active} of {options.experts} experts in {config.num_layers} layers")


if __name__ == "__main__":
    main()
