"""A GGUF file of a dense model, read as Hugging Face's format has it: weights, config and tokenizer.

Owns what a file must hold. Knows nothing of where files come from or of our parameter names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from unmask.errors import CheckpointError
from unmask.models.weights.gguf.layout import ROPE_FACTORS, heads_interleaved, hf_name, separate
from unmask.models.weights.gguf.metadata import Metadata
from unmask.models.weights.gguf.tokenizer import read_token_ids, read_tokenizer, read_tokenizer_config

# Types and the dtype that holds their values exactly: codes times scales need more bits than bfloat16 or float16 have.
_DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16} | dict.fromkeys(
    ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), torch.float32
)
_UNREADABLE = (OSError, ValueError, LookupError, OverflowError, RecursionError, TypeError)


class GGUFFile:
    """One GGUF file of a dense model of `metadata.ARCHITECTURES`.

    Raises:
        CheckpointError: the file is not GGUF, is cut short, or is of another architecture or another type of weights.
    """

    def __init__(self, path: Path) -> None:
        # Imported where it is used: only the first unpacking of a model needs it, and it costs every start.
        from gguf import GGUFReader

        self.path = path
        try:
            with path.open("rb") as file:
                start = file.read(4)
            if start != b"GGUF":
                raise CheckpointError(f"{path} is not a GGUF file: it begins with {start!r}; get it again")
            reader = GGUFReader(path)
            values = {name: field.contents() for name, field in reader.fields.items()}
        except _UNREADABLE as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{path} is not a complete GGUF file of known types ({reason}); get it again") from error
        self.metadata = Metadata(values, str(path))
        self.architecture = self.metadata.architecture()
        self._rope_factors = next((tensor for tensor in reader.tensors if tensor.name == ROPE_FACTORS), None)
        self._tensors = {self._checked_name(tensor): tensor for tensor in reader.tensors if tensor.name != ROPE_FACTORS}

    def names(self) -> list[str]:
        """Hugging Face names of the tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, outermost dimension first."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that holds a tensor's values exactly."""
        return _DTYPES[self._tensors[name].tensor_type.name]

    def tensor(self, name: str) -> Tensor:
        """The tensor of a Hugging Face name, dequantized, with Hugging Face's order of query and key rows."""
        from gguf.quants import dequantize

        stored = self._tensors[name]
        values = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()).reshape(self.shape(name))
        num_heads = self.metadata.integer(f"{self.architecture}.attention.head_count")
        num_kv_heads = self.metadata.integer(f"{self.architecture}.attention.head_count_kv", num_heads)
        heads = heads_interleaved(name, self.architecture, num_heads, num_kv_heads)
        return (values if heads is None else separate(values, heads)).to(self.dtype(name))

    def hf_config(self) -> dict[str, Any]:
        """The file's config in Hugging Face keys."""
        embedding = "model.embed_tokens.weight"
        if embedding not in self._tensors:
            raise CheckpointError(f"{self.path} lacks the tensor 'token_embd.weight'; get it again")
        factors = self._rope_factors
        config = self.metadata.hf_config(
            vocab_size=self.shape(embedding)[0],
            tied_head="lm_head.weight" not in self._tensors,
            biased={name.split(".")[-2] for name in self._tensors if name.endswith(".bias")},
            factors=None if factors is None else factors.data,
        )
        dtypes = {self.dtype(name) for name in self._tensors if len(self.shape(name)) > 1}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return {**config, **read_token_ids(self.metadata), "torch_dtype": str(dtype).removeprefix("torch.")}

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, rebuilt from the metadata."""
        return read_tokenizer(self.metadata)

    def tokenizer_config(self) -> dict[str, Any]:
        """Content of tokenizer_config.json."""
        return read_tokenizer_config(self.metadata)

    def _checked_name(self, tensor: Any) -> str:
        name = hf_name(tensor.name)
        if name is None:
            raise CheckpointError(f"{self.path} holds an unknown tensor {tensor.name!r}; only dense models can be read")
        if tensor.tensor_type.name not in _DTYPES:
            raise CheckpointError(
                f"{self.path} holds {tensor.name} as {tensor.tensor_type.name}; only {', '.join(_DTYPES)} can be read"
            )
        return name
