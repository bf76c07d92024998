"""Runs Python programs that a model wrote, each in its own process behind what this machine permits.

Owns the limits, the verdict and the choice of walls; the walls themselves are built by `sandbox_launcher.py`, which is
started as a script. Knows no benchmark. Three levels, best first; `isolation()` says which one is in force:

- `namespaces` (root, or a kernel that lets users make user namespaces): no network at all, not even loopback; an own root
  that has the interpreter, the system's libraries and an empty folder in memory (bounded in bytes and files) and nothing
  else; an own process table, so that nothing outside can be signalled and everything dies with its first process.
- `landlock` (Linux 5.13): files as above, except that the folder is on disk and bounded only per file; no TCP from Linux
  6.7, no signals to others from Linux 6.12; UDP and named UNIX sockets stay open.
- `limits`: resource limits and killing only.

Root always runs programs as a user id that nobody has; below `namespaces` that alone protects other processes, bounds forks
and makes the final kill complete. An ordinary user without namespaces gets that kill by best effort. Not promised anywhere:
the kernel is shared, and memory is bounded per process, so that a hostile program can hold a multiple of it.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from unmask.errors import BackendError, ConfigError, UnmaskWarning

Level = Literal["namespaces", "landlock", "limits"]
Status = Literal["passed", "exited", "failed", "timeout", "memory", "output", "killed"]
LAUNCHER, RUNNER = (Path(__file__).with_name(f"sandbox_{part}.py") for part in ("launcher", "runner"))
GRACE = 15.0
"""Seconds that the launcher has for clearing up before it is killed itself."""


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
                raise ConfigError(f"{name} {value} of a sandbox is not positive; leave it out for {getattr(Limits, name)}")


@dataclass(frozen=True)
class Isolation:
    """What holds here.

    Attributes:
        level: how it is done.
        network: what the program can reach: nothing, anything but TCP, everything.
        files: the home folder cannot be read, and nothing outside its folder written.
        signals: other processes cannot be signalled.
        forks: the number of processes is limited.
        complete_kill: no process can outlive the run, whatever it does.
    """

    level: Level
    network: Literal["none", "no TCP", "open"]
    files: bool
    signals: bool
    forks: bool
    complete_kill: bool

    @property
    def missing(self) -> tuple[str, ...]:
        """What a program could do."""
        risks = {
            "use the network": self.network == "open",
            "use the network, TCP excepted": self.network == "no TCP",
            "read your files and write outside its folder": not self.files,
            "kill your processes": not self.signals,
            "start any number of processes": not self.forks,
            "leave a process behind": not self.complete_kill,
        }
        return tuple(risk for risk, real in risks.items() if real)


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: "passed": its last line was reached; "exited": it left before, with exit code 0; "failed": an exception, a
            syntax error or another exit code; "timeout": too long, by the clock or the processor; "memory": an uncaught
            MemoryError; "output": too much of it; "killed": by a signal.
        exit_code: absent if it did not exit by itself.
        signal: that ended it.
        stdout: at most `output_bytes` of it, as UTF-8 with replacements.
        stderr: the same.
        seconds: by the clock, everything included.
    """

    status: Status
    exit_code: int | None
    signal: int | None
    stdout: str
    stderr: str
    seconds: float


@cache
def isolation() -> Isolation:
    """The best level that works here, found by running an empty program; warns of what it does not prevent.

    Raises:
        ConfigError: not Linux.
        BackendError: not even resource limits can be set.
    """
    if sys.platform != "linux":
        raise ConfigError(f"programs run in a sandbox on Linux only, not on {sys.platform}; use a Linux container")
    problems = []
    for level in ("namespaces", "landlock", "limits"):
        try:
            found = probe(level)
        except BackendError as error:
            problems.append(str(error))
            continue
        if found.missing:
            text = "; ".join(found.missing)
            warnings.warn(
                f"the sandbox for programs is weak here ({level}), a program could: {text}; allow user namespaces",
                UnmaskWarning,
                stacklevel=2,
            )
        return found
    raise BackendError(problems[-1])


def probe(level: Level) -> Isolation:
    """What one level gives on this machine.

    Raises:
        BackendError: it does not work here.
    """
    outcome, facts = _run("", "", Limits(seconds=60, cpu_seconds=30), level)
    if outcome.status != "passed":
        raise BackendError(f"the sandbox ({level}) cannot run an empty program: {outcome.status}, {outcome.stderr[-300:]!r}")
    inside, user, landlock = level == "namespaces", bool(facts["user"]), int(facts["landlock"]) if level == "landlock" else 0
    return Isolation(
        level,
        "none" if inside else "no TCP" if landlock >= 4 else "open",
        files=inside or landlock > 0,
        signals=inside or user or landlock >= 6,
        forks=inside or user or os.geteuid() != 0,
        complete_kill=inside or user,
    )


def run_program(source: str, *, stdin: str = "", limits: Limits = Limits(), level: Level | None = None) -> Outcome:
    """Run one program, as `__main__`, by this interpreter with the standard library alone; it cannot hang the caller.

    It starts in an empty folder, which is its HOME and goes afterwards, with an empty environment, a fixed hash seed and no
    descriptors but the usual three.

    Args:
        source: Python.
        stdin: what it can read.
        limits: what it can use.
        level: of isolation; None for the best here.

    Raises:
        ConfigError: not Linux.
        BackendError: the sandbox could not be set up.
    """
    return _run(source, stdin, limits, level or isolation().level)[0]


def run_many(
    programs: Sequence[str],
    *,
    workers: int | None = None,
    limits: Limits = Limits(),
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Run programs, `workers` at a time (one for each processor core).

    Args:
        programs: sources.
        workers: at a time.
        limits: of each.
        progress: told how many are done, of how many, after each; in the caller's thread.

    Returns:
        An outcome for each program, in order.

    Raises:
        ConfigError: not Linux, or no workers.
        BackendError: the sandbox could not be set up.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"{workers} workers cannot run programs; give 1 or more")
    level = isolation().level
    pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)))
    try:
        jobs = [pool.submit(run_program, source, limits=limits, level=level) for source in programs]
        for done, _ in enumerate(as_completed(jobs), 1):
            if progress is not None:
                progress(done, len(jobs))
        return [job.result() for job in jobs]
    finally:
        pool.shutdown(cancel_futures=True)


def _run(source: str, stdin: str, limits: Limits, level: Level) -> tuple[Outcome, dict[str, Any]]:
    """One program, and what the launcher said."""
    start, word = time.monotonic(), secrets.token_hex(16).encode()
    folder = tempfile.mkdtemp(prefix=f"unmask-sandbox-{os.getpid()}-")
    try:
        with ExitStack() as stack:
            job = _memory_file(stack, word + source.encode("utf-8", "surrogatepass"))
            given = _memory_file(stack, stdin.encode("utf-8", "surrogatepass"))
            pipes = {name: os.pipe() for name in ("report", "verdict", "stdout", "stderr")}
            readers = {name: stack.enter_context(open(ends[0], "rb", buffering=0)) for name, ends in pipes.items()}
            writers = {name: stack.enter_context(open(ends[1], "wb", buffering=0)) for name, ends in pipes.items()}
            process = _launch(level, limits, folder, job, given, {name: end.fileno() for name, end in writers.items()})
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
    """A nameless file that holds `content`, at its start."""
    handle = os.memfd_create("unmask")
    stack.callback(os.close, handle)
    with open(handle, "wb", closefd=False) as writer:
        writer.write(content)
    os.lseek(handle, 0, os.SEEK_SET)
    return handle


def _launch(level: Level, limits: Limits, folder: str, job: int, stdin: int, ends: dict[str, int]) -> subprocess.Popen[bytes]:
    """Start the launcher."""
    python = os.path.realpath(sys.executable)  # not the environment's: its packages stay out
    prefix = Path(python).parents[1]
    plan = {
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
        [python, "-I", "-S", str(LAUNCHER), json.dumps(plan)],
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
    """Read all pipes until the launcher closes its own; tell it to stop at the deadline or a bound, and say which.

    The launcher's end counts, not the program's: that may be closed early, or held by what it left behind.
    """
    ended: Status | None = None
    told = False
    texts = dict.fromkeys(readers.values(), b"")
    with selectors.DefaultSelector() as selector:
        for reader, name in readers.items():
            os.set_blocking(reader.fileno(), False)
            selector.register(reader, selectors.EVENT_READ, name)
        report = next(reader for reader, name in readers.items() if name == "report")
        while report in selector.get_map() and (now := time.monotonic()) < deadline + GRACE:
            if ended is None and now >= deadline:
                ended = "timeout"
            if ended is not None and not told:
                process.terminate()
                told, deadline = True, now
            if _read(selector, (deadline + GRACE if told else deadline) - now, texts, bounds):
                ended = ended or "output"
        while selector.get_map() and selector.select(0):
            if _read(selector, 0, texts, bounds):
                ended = ended or "output"
    return ended, texts


def _read(selector: selectors.BaseSelector, seconds: float, texts: dict[str, bytes], bounds: dict[str, int]) -> bool:
    """Take what is there, waiting for it if need be; whether a pipe went over its bound, which ends reading it."""
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
    """Bury the launcher, which is done by now, unless the caller was interrupted or it is stuck."""
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def _judge(ended: Status | None, status: int | None, word: bytes, texts: dict[str, bytes], seconds: float) -> Outcome:
    """The outcome, from the wait status of the program (None: it was stopped) and what came through the pipes."""
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
    """Delete a folder, whatever is in it: closed folders, a path too deep for shutil."""
    with suppress(OSError):
        os.rmdir(folder)  # the usual case: what was in it was in memory
    for command in (["rm", "-rf", "--"], ["chmod", "-R", "u+rwX", "--"], ["rm", "-rf", "--"]):
        if os.path.exists(folder):
            subprocess.run([*command, folder], check=False, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
