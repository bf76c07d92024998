"""unmask: from an autoregressive checkpoint to a block-diffusion language model, and fast decoding from it.

Public interface: `load(path_or_id, dtype=...)` gives a `LanguageModel` with `generate`, `generate_ids` and `logits`. Errors a
user can cause are `UnmaskError`s. Imports are lazy so that `import unmask` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.engine.llm import Generation, LanguageModel, load
    from unmask.errors import UnmaskError

__all__ = ["Generation", "LanguageModel", "UnmaskError", "__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("Generation", "LanguageModel", "load"):
        from unmask.engine import llm

        return getattr(llm, name)
    if name == "UnmaskError":
        from unmask.errors import UnmaskError

        return UnmaskError
    raise AttributeError(f"module 'unmask' has no attribute {name!r}")
