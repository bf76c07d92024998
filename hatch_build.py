"""Build hook of the wheel: compiles the CPU kernels into it, and into the source tree of an editable installation.

`UNMASK_TARGET=aarch64-linux` builds for another machine; see `unmask.models.native.build`. Without a C++ compiler the wheel is
pure Python, and the installed package computes with PyTorch and says so.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface[Any]):
    """Adds the compiled libraries and the platform's tag."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before hatchling packs: `version` is "standard" or "editable"."""
        sys.path.insert(0, str(Path(self.root, "src")))
        from unmask.models.native.build import CompilerError, compile_kernels, find_target
        from unmask.models.native.variants import LIBRARIES

        name = os.environ.get("UNMASK_TARGET")
        try:
            target = find_target(name)
            folder = LIBRARIES if name is None else Path(self.root, "build", "kernels", name)
            libraries, problems = compile_kernels(target, folder)
            if name is not None and problems:
                raise CompilerError("; ".join(problems))
        except CompilerError as error:
            if name is not None:
                raise
            libraries, problems = [], [f"{error}; the CPU kernels are not built"]
        for problem in problems:
            self.app.display_warning(problem)
        if libraries and version == "standard":
            build_data["pure_python"] = False
            build_data["tag"] = target.tag(libraries)
            build_data["force_include"] |= {
                str(path): f"unmask/models/native/{LIBRARIES.name}/{path.name}" for path in libraries
            }
