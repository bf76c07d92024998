"""unmask: from an autoregressive checkpoint to a block-diffusion language model, and fast decoding from it.

Public interface: `load(path_or_id, dtype=...)` gives a `LanguageModel` with `generate`, `generate_ids` and `logits`;
`SamplingParams` holds decoding options. Errors a user can cause are `UnmaskError`s. Imports are lazy so that `import unmask`
costs nothing.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # as in `typing`, whose import would take most of this one's time
if TYPE_CHECKING:
    from typing import Any

    from unmask.engine.generation import Generation
    from unmask.engine.llm import LanguageModel
    from unmask.engine.loading import load
    from unmask.engine.sampling_params import SamplingParams
    from unmask.errors import UnmaskError

__all__ = ["Generation", "LanguageModel", "SamplingParams", "UnmaskError", "__version__", "load"]
__version__ = "0.1.0"
_HOMES = {
    "Generation": "unmask.engine.generation",
    "LanguageModel": "unmask.engine.llm",
    "SamplingParams": "unmask.engine.sampling_params",
    "UnmaskError": "unmask.errors",
    "load": "unmask.engine.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unmask' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
