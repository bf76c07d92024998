"""`ServedAdapters`: LoRA adapters by name, each a served model of its own over the weights of the base.

Owns which are loaded, how many may be, and from where clients may load them. Every method is called on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import gc
import re
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

from unmask.engine.adapted import adapted_model
from unmask.errors import ConfigError, RequestError, UnmaskError
from unmask.models.weights.lora_adapter import LoraAdapter
from unmask.serve.errors import ApiError, bad_request
from unmask.serve.served_model import ServedModel

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED = "latest"
"""Ollama's tag of a model itself."""


class ServedAdapters:
    """The adapters of a served model: those of its config at first.

    Requests that run keep their adapter until they end, whatever is unloaded meanwhile; those count, too.

    Args:
        base: the model.

    Raises:
        ConfigError, CheckpointError: an adapter of the config is refused.
    """

    def __init__(self, base: ServedModel) -> None:
        self.base, self._config = base, base.config
        self._models: dict[str, ServedModel] = {}
        self._alive: WeakSet[LoraAdapter] = WeakSet()
        self._loading = asyncio.Lock()
        for given in self._config.loras:
            name, _, folder = given.partition("=")
            if problem := self._wrong_name(name):
                raise ConfigError(f"loras: {problem}")
            self._models[name] = self._read(name, Path(folder))

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """The base with each adapter."""
        return tuple(self._models.values())

    def find(self, name: str) -> ServedModel | None:
        """The base or one with an adapter, by any of its names."""
        return next((model for model in (self.base, *self.models) if name in model.names), None)

    async def load(self, name: str, path: str, *, replace: bool = False) -> None:
        """Load an adapter from the folder of adapters.

        Args:
            name: of letters, digits, dots, hyphens and underscores.
            path: relative to that folder, or within it.
            replace: one of this name.

        Raises:
            ApiError: it is refused, or there are as many as may be.
        """
        if problem := self._wrong_name(name):
            raise bad_request(problem, "lora_name")
        async with self._loading:
            if name in self._models and not replace:
                raise bad_request(f"adapter {name!r} is loaded already; unload it first, or set load_inplace", "lora_name")
            folder = self._folder(path)
            self._check_room()
            try:
                self._models[name] = await asyncio.to_thread(self._read, name, folder, self._config.max_lora_rank)
            except UnmaskError as error:
                raise bad_request(str(error).replace(f"{folder}", path), "lora_path") from error

    def unload(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ApiError: there is none of this name.
        """
        if self._models.pop(name, None) is None:
            loaded = ", ".join(self._models) or "none"
            raise ApiError(404, f"adapter {name[:80]!r} is not loaded ({loaded})", param="lora_name", code="adapter_not_found")

    def _read(self, name: str, folder: Path, max_rank: int | None = None) -> ServedModel:
        language_model = self.base.language_model
        with suppress(RequestError):
            _ = language_model.grammars  # which all share
        adapted = adapted_model(language_model, folder, name=name, max_rank=max_rank)
        assert adapted.adapter is not None
        self._alive.add(adapted.adapter)
        return ServedModel(adapted, self._config, parent=self.base)

    def _wrong_name(self, name: str) -> str | None:
        if _NAME.fullmatch(name) is None or name == _RESERVED:
            return (
                f"{name[:80]!r} is no name of an adapter; use letters, digits, dots, hyphens and underscores, not {_RESERVED}"
            )
        return f"{name!r} is a name of the model itself; use another" if name in self.base.names else None

    def _folder(self, path: str) -> Path:
        """The folder that a client names."""
        root = self._config.lora_folder
        if root is None:
            raise updates_off()
        root = root.expanduser().resolve()
        try:
            folder = (root / path).resolve()
            is_there = folder.is_relative_to(root) and folder.is_dir()
        except (OSError, ValueError):  # no path at all
            is_there = False
        if not is_there:
            raise bad_request(f"{path[:200]!r} is no folder in the server's folder of adapters", "lora_path")
        return folder

    def _check_room(self) -> None:
        most = self._config.max_loras
        if len(self._alive) >= most:
            gc.collect()  # what failed requests have left behind
        if len(self._alive) >= most:
            raise bad_request(
                f"{len(self._alive)} adapters are loaded or still used by requests, of at most {most} (max_loras); unload one",
                "lora_name",
                "too_many_adapters",
            )


def updates_off() -> ApiError:
    """403: clients may not load and unload adapters."""
    message = "adapters are not loaded and unloaded over HTTP here; start the server with lora_folder"
    return ApiError(403, message, code="lora_updates_off")
