"""LoRA adapters: low-rank updates of linear layers, their files in the layout of PEFT, and folding them into the weights.

Owns the adapted layer, its attachment, and the two files of an adapter. What the keys of its config mean is `peft_keys`', what
the modules are called on disk `families`' matter. Knows nothing of training.

Legend: D inputs, F outputs of a layer; R rank.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.errors import CheckpointError, ConfigError
from unmask.files import Writer, json_writer, read_json, write_folder
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Transformer, untie_head
from unmask.models.dtypes import dtype_name
from unmask.models.families.registry import family_of, stored_tensors, write_config
from unmask.models.weights.hub import ADAPTED_CONFIG, ADAPTER_CONFIG
from unmask.models.weights.peft_keys import ModuleLora, read_settings, write_settings
from unmask.models.weights.safetensors_io import read_tensors, specs_of, stored_shape, write_safetensors

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HEAD = "lm_head"


class LoraLinear(nn.Linear):
    """A frozen linear layer plus `alpha / rank * B A` for each part of it that is adapted.

    A part is a module on disk: fused projections (query-key-value, gate-up) have several, each with a LoRA of its own or none.
    The weight keeps its name, so a checkpoint of the base still fits.
    """

    def __init__(self, base: nn.Linear, parts: Sequence[tuple[int, ModuleLora | None]], generator: torch.Generator) -> None:
        """Adapt a layer.

        Args:
            base: whose weight [F, D] and bias are taken over.
            parts: rows of each part and its LoRA, if any; the rows sum to F.
            generator: of A; B starts at zero.
        """
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        assert sum(rows for rows, _ in parts) == base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.parts = tuple(parts)
        self.active = True
        self.lora_a, self.lora_b = nn.ParameterDict(), nn.ParameterDict()
        bound = math.sqrt(3.0 / base.in_features)
        for number, (rows, lora) in enumerate(parts):
            if lora is not None:
                a = torch.empty(lora.rank, base.in_features).uniform_(-bound, bound, generator=generator)
                # Beside weights that are still to be loaded, an adapter is real: no file holds it.
                device = a.device if base.weight.is_meta else base.weight.device
                self.lora_a[str(number)] = nn.Parameter(a.to(device, base.weight.dtype))
                self.lora_b[str(number)] = nn.Parameter(torch.zeros(rows, lora.rank).to(device, base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        frozen = F.linear(x, self.weight, self.bias)
        if not self.active:
            return frozen
        updates = []
        for number, (rows, lora) in enumerate(self.parts):
            if lora is None:
                updates.append(x.new_zeros(*x.shape[:-1], rows))
            else:
                updates.append(F.linear(F.linear(x, self.lora_a[str(number)]), self.lora_b[str(number)]) * lora.scale)
        return frozen + torch.cat(updates, dim=-1)

    @torch.no_grad()
    def folded(self) -> Tensor:
        """The merged weight [F, D], in the weight's dtype, summed in float32."""
        weight = self.weight.float()
        deltas = weight.new_zeros(weight.shape)
        for number, rows in enumerate(deltas.split([rows for rows, _ in self.parts])):
            lora = self.parts[number][1]
            if lora is not None:
                rows += lora.scale * (self.lora_b[str(number)].float() @ self.lora_a[str(number)].float())
        return (weight + deltas).to(self.weight.dtype)


def attach_lora(model: Transformer, *, rank: int, alpha: float, seed: int, train_embedding: bool) -> Transformer:
    """Freeze the model and adapt every linear layer of attention and the dense feed-forwards, in place.

    Args:
        model: whose linear layers are replaced; routed experts stay frozen.
        rank: R.
        alpha: the update is scaled by alpha / rank.
        seed: of A; B starts at zero, so the model computes what it did before.
        train_embedding: leave the embedding (and an untied head) trainable: a new mask token needs it.

    Returns:
        `model`.

    Raises:
        ConfigError: the rank is below 1, or the model has an adapter already.

    Source: LoRA (2106.09685) Eq. 3.
    """
    if rank < 1:
        raise ConfigError(f"LoRA rank is {rank}; it must be at least 1")
    return _attach(model, lambda module: ModuleLora(rank, alpha), seed=seed, train_embedding=train_embedding)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch the adapter off inside the context, so that the model computes what it did before it was adapted.

    An embedding trained along with the adapter stays as trained: attach with `train_embedding=False` where that matters.

    Args:
        model: with an adapter.

    Raises:
        ConfigError: the model has no adapter.
    """
    layers = [layer for _, layer in _lora_layers(model)]
    if not layers:
        raise ConfigError("the model has no adapter to switch off; attach one, or keep a frozen copy of the model instead")
    before = [layer.active for layer in layers]
    try:
        for layer in layers:
            layer.active = False
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


@torch.no_grad()
def folded_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, or of a part of one, with every adapter folded into its weight.

    Args:
        model: with an adapter or without.

    Returns:
        Tensors under the names and in the shapes of the model without adapters.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    return state | {f"{name}.weight": layer.folded() for name, layer in _lora_layers(model)}


def save_adapter(model: Transformer, folder: Path, *, base: str) -> None:
    """Write the adapter in the layout of PEFT, completely or not at all.

    Embedding and head go with it when they are trainable. Beside PEFT's two files lies `unmask_config.json`, the config of the
    adapted model, for its mask token, block size and vocabulary. The tokenizer's files may be put there too
    (`Tokenizer.save`); where they are not, the base's tokenizer is used.

    Args:
        model: with an adapter.
        folder: new, or of an adapter to replace.
        base: the model that was adapted: a folder, a Hugging Face id or the name of an embedded model.

    Raises:
        ConfigError: the model has no adapter.
        CheckpointError: the disk is full or refuses.
    """
    loras, tensors = _adapter_tensors(model)
    if not loras:
        raise ConfigError("the model has no adapter to save; attach one, or save the whole model")
    modules_to_save = None
    if model.head_weight.requires_grad:
        # Both even where they are one: PEFT would leave the head as it was if only the embedding were stored.
        tensors |= _vocabulary_tensors(model)
        modules_to_save = [family_of(model.config).embedding.rpartition(".")[2], _HEAD]
    base = str(Path(base).resolve()) if Path(base).exists() else base
    modules = [name.removesuffix(".weight") for name in stored_tensors(model.config)]
    specs = specs_of(tensors)
    settings = write_settings(loras, modules, base=base, modules_to_save=modules_to_save)
    writers: dict[str, Writer] = {
        ADAPTER_WEIGHTS: partial(write_safetensors, specs=specs, names=specs, read=tensors.__getitem__),
        ADAPTED_CONFIG: json_writer(write_config(model.config, dtype=dtype_name(model.embed.weight.dtype))),
        ADAPTER_CONFIG: json_writer(settings),
    }
    write_folder(folder, writers)


def load_adapter(model: Transformer, folder: Path) -> Transformer:
    """Attach the adapter in `folder` to the model it was made for, in place, and fill it.

    Args:
        model: the base, its vocabulary of the size the adapter has. It is frozen, but for the adapter and for the embedding
            and head if the adapter brings them. A tied head is untied where the adapter brings one that differs.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`, ours or of the peft library.

    Returns:
        `model`.

    Raises:
        CheckpointError: a file is missing or damaged; a setting is not supported; or tensors are missing, unexpected or
            misshaped, all of which are named. The model is then as it was.
        ConfigError: the model has an adapter already.
    """
    settings, tensors = read_json(folder / ADAPTER_CONFIG), read_tensors(folder / ADAPTER_WEIGHTS)
    loras = adapter_loras(folder, model.config, settings)
    check_fit(folder, model.config, settings, loras, tensors)
    if model.config.tied_head and _unties(model, settings, tensors):
        untie_head(model)
    vocabulary = {name: parameter for name, parameter in _vocabulary_tensors(model).items() if name in tensors}
    _attach(model, loras.get, seed=0, train_embedding=bool(vocabulary))
    with torch.no_grad():
        for name, parameter in (_adapter_tensors(model)[1] | vocabulary).items():
            parameter.copy_(tensors[name])
    return model


def fold_adapter(model: Transformer) -> Transformer:
    """Replace every adapted layer by a plain one that computes the same, in place; all parameters are trainable then."""
    for name, layer in _lora_layers(model):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(layer.folded()), layer.bias
        _replace(model, name, plain)
    return model.requires_grad_(True)


def stored_vocab_size(folder: Path, config: ModelConfig) -> int | None:
    """Rows of the embedding that the adapter in `folder` brings along; None: it brings none."""
    shape = stored_shape(folder / ADAPTER_WEIGHTS, f"{_PREFIX}{family_of(config).embedding}.weight")
    return None if shape is None else shape[0]


def adapter_loras(folder: Path, config: ModelConfig, settings: Mapping[str, Any]) -> dict[str, ModuleLora]:
    """Rank and alpha of each module that an adapter changes, by its name on disk; as of `read_settings`.

    Raises:
        CheckpointError: a setting is not supported, or no module is changed.
    """
    parts = [module for layer in adaptable_layers(config).values() for module, _ in layer]
    try:
        return read_settings(settings, parts)
    except ConfigError as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {error}") from error


def tensor_names(module: str) -> tuple[str, str]:
    """Names of A and B of a module in the file."""
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def adaptable_layers(config: ModelConfig) -> dict[str, list[tuple[str, int]]]:
    """The linear layers that can be adapted: of each, the modules on disk that are fused in it and their rows, in order."""
    layers: dict[str, list[tuple[str, int]]] = {}
    for name, tensor in stored_tensors(config).items():
        if tensor.parameter.startswith("blocks.") and tensor.parameter.endswith(".weight") and len(tensor.shape) == 2:
            modules = layers.setdefault(tensor.parameter.removesuffix(".weight"), [])
            modules.append((name.removesuffix(".weight"), tensor.shape[0]))
    return layers


def _attach(
    model: Transformer, lora_of: Callable[[str], ModuleLora | None], *, seed: int, train_embedding: bool
) -> Transformer:
    if _lora_layers(model):
        raise ConfigError("the model has an adapter already; fold it in first (save the model and load it)")
    if model.config.gated_lora_rank is not None:
        raise ConfigError("the model has gated LoRA, which adapters cannot be attached beside; train it further as it is")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, modules in adaptable_layers(model.config).items():
        parts = [(rows, lora_of(module)) for module, rows in modules]
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear), f"{name} is not a linear layer"
        if any(lora is not None for _, lora in parts):
            _replace(model, name, LoraLinear(layer, parts, generator))
    if train_embedding:
        model.embed.weight.requires_grad_(True)
        model.head_weight.requires_grad_(True)
    return model


def _lora_layers(model: nn.Module) -> list[tuple[str, LoraLinear]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLinear)]


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _adapter_tensors(model: Transformer) -> tuple[dict[str, ModuleLora], dict[str, Tensor]]:
    """Rank and alpha of each adapted module on disk, and the tensors A and B under their names in the file."""
    layers, loras = adaptable_layers(model.config), {}
    tensors: dict[str, Tensor] = {}
    for name, layer in _lora_layers(model):
        for number, (module, _) in enumerate(layers[name]):
            lora = layer.parts[number][1]
            if lora is not None:
                loras[module] = lora
                a, b = tensor_names(module)
                tensors |= {a: layer.lora_a[str(number)], b: layer.lora_b[str(number)]}
    return loras, tensors


def _vocabulary_tensors(model: Transformer) -> dict[str, Tensor]:
    """Embedding and head, which may be one tensor, under their names in the file."""
    return dict(zip(vocabulary_names(model.config), (model.embed.weight, model.head_weight), strict=True))


def vocabulary_names(config: ModelConfig) -> list[str]:
    """Names of embedding and head in the file."""
    return [f"{_PREFIX}{name}.weight" for name in (family_of(config).embedding, _HEAD)]


def _unties(model: Transformer, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether the adapter parts a tied head from its embedding; PEFT leaves the head as it was beside a new embedding alone."""
    embedding, head = (tensors.get(name) for name in _vocabulary_tensors(model))
    if head is None:
        return embedding is not None and not settings.get("ensure_weight_tying")
    return not torch.equal(head, model.embed.weight.to(head) if embedding is None else embedding)


def check_fit(
    folder: Path,
    config: ModelConfig,
    settings: Mapping[str, Any],
    loras: Mapping[str, ModuleLora],
    tensors: Mapping[str, Tensor],
) -> None:
    """Compare an adapter's file with the config of its base.

    Raises:
        CheckpointError: all mismatches, in one error.
    """
    expected: dict[str, tuple[int, ...]] = {}
    stored = stored_tensors(config)
    for module, lora in loras.items():
        rows, columns = stored[f"{module}.weight"].shape
        expected |= dict(zip(tensor_names(module), ((lora.rank, columns), (rows, lora.rank)), strict=True))
    vocabulary = vocabulary_names(config)
    saved = settings.get("modules_to_save") or []
    modules = {name: name.removeprefix(_PREFIX).removesuffix(".weight") for name in vocabulary}
    wanted = {name for name, module in modules.items() if any(f".{module}".endswith(f".{last}") for last in saved)}
    problems = [
        f"modules_to_save names {last}, not the embedding or head"
        for last in saved
        if not any(f".{module}".endswith(f".{last}") for module in modules.values())
    ]
    size = (config.vocab_size, config.hidden_size)
    expected |= {name: size for name in vocabulary if name in tensors or name in wanted}
    problems += [f"missing: {name}" for name in expected if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in expected]
    problems += [
        f"wrong shape: {name} is {list(tensors[name].shape)}, must be {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if problems:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS} does not fit the model: {'; '.join(problems)}")
