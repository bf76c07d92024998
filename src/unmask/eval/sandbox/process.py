"""One sandboxed process: starts the launcher, reads its pipes, enforces time and output limits, and judges how it ended.

Owns the verdict and the cleaning up. The isolation itself is built by `launcher.py`, which is executed as a script and in turn
executes `runner.py`.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from unmask.errors import BackendError, ConfigError, UnmaskWarning

Level = Literal["namespaces", "landlock", "limits"]
Status = Literal["passed", "exited", "failed", "timeout", "memory", "output", "killed"]
LAUNCHER, RUNNER = (Path(__file__).with_name(name) for name in ("launcher.py", "runner.py"))
GRACE = 15.0
"""Seconds that the launcher has for cleaning up before it is killed itself."""


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


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: "passed": it reached its last line; "exited": it left before that, with exit code 0; "failed": an exception, a
            syntax error or another exit code; "timeout": too long by the clock or in processor time; "memory": an uncaught
            MemoryError; "output": too much of it; "killed": by a signal.
        exit_code: None if it did not exit by itself.
        signal: the one that ended it, if any.
        stdout, stderr: at most `output_bytes` of each, as UTF-8 with replacements.
        seconds: by the clock, everything included.
    """

    status: Status
    exit_code: int | None
    signal: int | None
    stdout: str
    stderr: str
    seconds: float


def run(source: str, stdin: str, limits: Limits, level: Level) -> tuple[Outcome, dict[str, Any]]:
    """Run one program; its outcome, and the facts that the launcher reports."""
    start, word = time.monotonic(), secrets.token_hex(16).encode()
    folder = tempfile.mkdtemp(prefix=f"unmask-sandbox-{os.getpid()}-")
    try:
        with ExitStack() as stack:
            job = _memory_file(stack, word + source.encode("utf-8", "surrogatepass"))
            stdin_file = _memory_file(stack, stdin.encode("utf-8", "surrogatepass"))
            pipes = {name: os.pipe() for name in ("report", "verdict", "stdout", "stderr")}
            readers = {name: stack.enter_context(open(ends[0], "rb", buffering=0)) for name, ends in pipes.items()}
            writers = {name: stack.enter_context(open(ends[1], "wb", buffering=0)) for name, ends in pipes.items()}
            process = _launch(level, limits, folder, job, stdin_file, {name: end.fileno() for name, end in writers.items()})
            for end in writers.values():
                end.close()
            bounds = {"report": 1 << 16, "verdict": 64, "stdout": limits.output_bytes, "stderr": limits.output_bytes}
            try:
                ended, texts = _follow(process, {readers[name]: name for name in pipes}, bounds, start + limits.seconds)
            finally:
                _end(process)
    except OSError as error:
        raise BackendError(f"the sandbox ({level}) cannot start: {error}; give Python read rights and memory") from None
    finally:
        _remove(folder)
    facts: dict[str, Any] = {}
    for line in texts["report"].splitlines():
        facts.update(json.loads(line))
    if "error" in facts:
        raise BackendError(f"the sandbox ({level}) could not be set up: {facts['error']}; use another level")
    if not facts.get("clean", True):
        warnings.warn("a program left processes behind that could not be killed; see ps", UnmaskWarning, stacklevel=3)
    return _judge(ended, facts.get("status"), word, texts, time.monotonic() - start), facts


def _memory_file(stack: ExitStack, content: bytes) -> int:
    """Descriptor of an anonymous file in memory that holds `content`, at its start."""
    handle = os.memfd_create("unmask")
    stack.callback(os.close, handle)
    with open(handle, "wb", closefd=False) as writer:
        writer.write(content)
    os.lseek(handle, 0, os.SEEK_SET)
    return handle


def _launch(level: Level, limits: Limits, folder: str, job: int, stdin: int, ends: dict[str, int]) -> subprocess.Popen[bytes]:
    """Start the launcher with the job as its argument."""
    python = os.path.realpath(sys.executable)  # not that of the virtual environment, whose packages stay out
    prefix = Path(python).parents[1]
    arguments = {
        "level": level,
        "parent": os.getpid(),
        "report": ends["report"],
        "verdict": ends["verdict"],
        "source": job,
        "folder": folder,
        "runner": RUNNER.read_text(),
        "python": python,
        "readable": [python, str(prefix / "lib"), str(prefix / "lib64")],
        "limits": asdict(limits),
    }
    return subprocess.Popen(
        [python, "-I", "-S", str(LAUNCHER), json.dumps(arguments)],
        stdin=stdin,
        stdout=ends["stdout"],
        stderr=ends["stderr"],
        pass_fds=(ends["report"], ends["verdict"], job),
        env={},
        cwd=folder,
        start_new_session=True,
    )


def _follow(
    process: subprocess.Popen[bytes], readers: dict[Any, str], bounds: dict[str, int], deadline: float
) -> tuple[Status | None, dict[str, bytes]]:
    """Read all pipes until the launcher closes its report; stop it at the deadline or at an output limit.

    The launcher's pipe counts, not the program's: that may be closed early, or held open by a process it left behind.

    Returns:
        "timeout" or "output" where the program was stopped, and the text of each pipe.
    """
    ended: Status | None = None
    stopped = False
    texts = dict.fromkeys(readers.values(), b"")
    with selectors.DefaultSelector() as selector:
        for reader, name in readers.items():
            os.set_blocking(reader.fileno(), False)
            selector.register(reader, selectors.EVENT_READ, name)
        report = next(reader for reader, name in readers.items() if name == "report")
        while report in selector.get_map() and (now := time.monotonic()) < deadline + GRACE:
            if ended is None and now >= deadline:
                ended = "timeout"
            if ended is not None and not stopped:
                process.terminate()
                stopped, deadline = True, now
            if _read(selector, (deadline + GRACE if stopped else deadline) - now, texts, bounds):
                ended = ended or "output"
        while selector.get_map() and selector.select(0):
            if _read(selector, 0, texts, bounds):
                ended = ended or "output"
    return ended, texts


def _read(selector: selectors.BaseSelector, seconds: float, texts: dict[str, bytes], bounds: dict[str, int]) -> bool:
    """Read available data, waiting up to `seconds`; whether a pipe reached its bound, which ends reading it."""
    over = False
    for key, _ in selector.select(max(0.0, seconds)):
        piece = os.read(key.fd, 1 << 16)
        texts[key.data] = (texts[key.data] + piece)[: bounds[key.data]]
        full = len(texts[key.data]) == bounds[key.data]
        over |= full
        if full or not piece:
            selector.unregister(key.fileobj)
    return over


def _end(process: subprocess.Popen[bytes]) -> None:
    """Reap the launcher, which has ended by now unless the caller was interrupted or it is stuck."""
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def _judge(ended: Status | None, status: int | None, word: bytes, texts: dict[str, bytes], seconds: float) -> Outcome:
    """The outcome, from the program's wait status (None: it was stopped) and the contents of the pipes."""
    code = None if status is None or os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
    number = os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else None
    if ended is None:
        if texts["verdict"] == word:
            ended = "passed"
        elif texts["verdict"] == b"memory":
            ended = "memory"
        elif number is not None or status is None:
            ended = "timeout" if number == signal.SIGXCPU else "killed"
        else:
            ended = "failed" if code else "exited"
    stdout, stderr = (texts[name].decode("utf-8", "replace") for name in ("stdout", "stderr"))
    return Outcome(ended, code, number, stdout, stderr, seconds)


def _remove(folder: str) -> None:
    """Delete a folder with all its content, even unreadable folders and paths too deep for shutil."""
    with suppress(OSError):
        os.rmdir(folder)  # the usual case: its content was in memory
    for command in (["rm", "-rf", "--"], ["chmod", "-R", "u+rwX", "--"], ["rm", "-rf", "--"]):
        if os.path.exists(folder):
            subprocess.run([*command, folder], check=False, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
