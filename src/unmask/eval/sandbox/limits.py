"""Limits of a sandboxed program: time, memory, output, files and processes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from unmask.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: by the clock, with about 0.1 for starting it.
        cpu_seconds: of processor time, for each of its processes; whole seconds are enforced.
        memory_bytes: of address space, for each process.
        output_bytes: of stdout, and of stderr; more ends the program.
        file_bytes: of one file.
        folder_bytes: of all files together (`namespaces` only).
        files: how many files (`namespaces` only).
        processes: at a time, threads included.
        open_files: at a time, for each process.
    """

    seconds: float = 15.0
    cpu_seconds: float = 5.0
    memory_bytes: int = 1 << 30
    output_bytes: int = 1 << 16
    file_bytes: int = 16 << 20
    folder_bytes: int = 64 << 20
    files: int = 1000
    processes: int = 16
    open_files: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise ConfigError(f"{name} is {value}; it must be positive, such as its default of {getattr(Limits, name)}")
