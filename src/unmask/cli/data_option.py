"""The option `--data`: one word to one source of a recipe.

Owns the choice of a source's kind. Whether the source can be read is checked by `data.sources`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from unmask.errors import ConfigError

if TYPE_CHECKING:
    from unmask.data.documents import Source

GENERATED_PREFIX = "reasoning_gym:"
_KINDS = {".jsonl": "jsonl", ".parquet": "parquet", ".txt": "text"}
_WAYS = (
    "use a .jsonl, .parquet or .txt file, a folder of such or of packed rows, a Hugging Face dataset id, or "
    "reasoning_gym:FAMILY"
)


def source_of(data: str) -> dict[str, object]:
    """The source that `data` names, as a recipe spells it.

    Args:
        data: a file, a folder of files of one kind, a pattern, `reasoning_gym:family[,family...]`, or the id of a dataset.

    Raises:
        ConfigError: it is nothing of the sort.
    """
    from unmask.models.weights.hub import is_hub_id

    if data.startswith(GENERATED_PREFIX):
        families = [family.strip() for family in data.removeprefix(GENERATED_PREFIX).split(",")]
        return {"kind": "reasoning_gym", "families": {family: {} for family in families}}
    if not data:
        raise ConfigError(f"--data is empty; {_WAYS}")
    path = Path(data).expanduser()
    if path.is_dir():
        from unmask.data.packed import is_packed

        return {"kind": "packed" if is_packed(path) else _kind_of_folder(path), "path": data}
    if path.suffix in _KINDS:
        return {"kind": _KINDS[path.suffix], "path": data}
    if path.exists():
        raise ConfigError(f"--data {data}: '{path.suffix}' files cannot be read; {_WAYS}")
    if is_hub_id(data) or re.fullmatch(r"[\w-]+", data):  # datasets may lack an owner
        return {"kind": "huggingface", "id": data}
    raise ConfigError(f"--data {data}: no such file; {_WAYS}")


def text_source(folder: Path, data: str, option: str) -> Source:
    """The documents that `data` names, in their order, encoded for the model in a folder.

    Raises:
        CheckpointError: there is no model in the folder.
        ConfigError: it is nothing of the sort, or holds no text, or the model has no tokenizer.
        DataError: there are no files.
    """
    from unmask.data.sources import SourceConfig, open_source
    from unmask.data.tokenizer import load_tokenizer
    from unmask.models.weights.checkpoint import read_model_config
    from unmask.models.weights.hub import tokenizer_folder

    start = read_model_config(folder).start_id
    config = SourceConfig.model_validate({**source_of(data), "shuffle": False})
    check_paths([config.path])
    where = tokenizer_folder(folder)
    if config.kind == "packed" or where is None:
        what = "holds packed rows" if config.kind == "packed" else f"is text, and {folder} has no tokenizer"
        raise ConfigError(f"{option} {data} {what}; give documents, and a model with a tokenizer")
    tokenizer = load_tokenizer(where)
    tokenizer.set_start_token(start)
    return open_source(config, tokenizer, 0)


def check_paths(paths: Iterable[str | None]) -> None:
    """Raise DataError where a source has no files, before a model is loaded."""
    from unmask.data.records import find_files

    for path in paths:
        if path is not None:
            find_files(path, "")


def _kind_of_folder(folder: Path) -> str:
    kinds = [kind for suffix, kind in _KINDS.items() if any(folder.rglob(f"*{suffix}"))]
    if len(kinds) != 1:
        what = f"files of {len(kinds)} kinds ({', '.join(kinds)})" if kinds else "no data files"
        raise ConfigError(f"--data {folder}: the folder holds {what}; {_WAYS}")
    return kinds[0]
