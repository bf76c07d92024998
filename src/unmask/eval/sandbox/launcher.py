"""Sandbox launcher: isolates an untrusted program, runs it and cleans up. A script, executed as `python -I -S` by `process.py`.

Owns namespaces, mounts, Landlock, the change of user, resource limits and the killing of remaining processes. Knows only the
standard library and its one argument; must import nothing of the package. Processes: launcher -> (first process of the new
process namespace) -> program. Each dies with its parent; the launcher ends the program on SIGTERM.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time
from typing import Any, NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, BIND, REC, PRIVATE, DETACH = 1, 2, 4, 0x1000, 0x4000, 0x40000, 2
PDEATHSIG, DUMPABLE, SUBREAPER, NO_NEW_PRIVS = 1, 4, 36, 38
RECURSIVE, SYS_MOUNT_SETATTR, SYS_LANDLOCK = 0x8000, 442, 444  # calls: the same on every architecture
READ, WRITE_FILE, READ_FILE = 0b1101, 0b10, 0b100  # Landlock: execute, read files, list folders
FILE_RIGHTS = 0b111 | 1 << 14 | 1 << 15  # those that make sense for something that is not a folder
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
HOME = "/tmp"  # of the program, in its own root
SWEEP_SECONDS = 5.0

Job = dict[str, Any]
"""level, parent, report, source, verdict (descriptors), folder, runner, python, readable, limits."""


def call(name: str, *arguments: Any) -> int:
    """Call a C library function that returns a negative number and sets errno when it fails.

    Raises:
        OSError: it failed.
    """
    result = int(getattr(LIBC, name)(*arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"{name}{arguments[:3]}")
    return result


def prctl(option: int, value: int) -> None:
    """Set one attribute of this process."""
    call("prctl", option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def spare_user() -> int | None:
    """A user id that nobody has, where this process may change users: as root, outside of a bare user namespace."""
    with open("/proc/self/status") as facts:
        capabilities = next(int(line.split()[1], 16) for line in facts if line.startswith("CapEff"))
    if capabilities & 0b11000001 != 0b11000001:  # change owners, groups, users
        return None
    with open("/proc/self/uid_map") as table:
        first, count = max(((int(a), int(c)) for a, _, c in map(str.split, table)), key=lambda entry: entry[1])
    share = min(count, 1 << 31) // 4
    return first + share + int.from_bytes(os.urandom(4), "little") % share if share else None


def enter_namespaces(user: int | None) -> None:
    """Enter new namespaces of mounts, processes, network and shared memory; through a user namespace where not root."""
    outside = os.geteuid(), os.getegid()
    call("unshare", NEWNS | NEWPID | NEWNET | NEWIPC | (NEWUSER if user is None else 0))
    if user is None:
        for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {outside[0]} 1"), ("gid_map", f"1000 {outside[1]} 1")):
            with open(f"/proc/self/{name}", "w") as handle:  # not 0 inside: exec then takes all capabilities away
                handle.write(text)


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2)."""
    call("mount", source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), data.encode())


def set_read_only(path: str, flags: int) -> None:
    """Make a mount read-only, with `RECURSIVE` also all mounts below it."""
    attributes = struct.pack("=QQQQ", RDONLY | NOSUID, 0, 0, 0)
    call("syscall", SYS_MOUNT_SETATTR, -100, path.encode(), flags, attributes, ctypes.c_size_t(len(attributes)))


def private_root(job: Job, user: int | None) -> None:
    """Switch to a new root with the interpreter and the system's libraries, read-only, and an empty /tmp in memory."""
    limits, root = job["limits"], job["folder"]
    mount("none", "/", None, REC | PRIVATE)
    mount("none", root, "tmpfs", NOSUID | NODEV, "mode=755,size=1m")
    for path in (*SYSTEM, *DEVICES, *job["readable"]):
        target = root + path
        if not os.path.exists(path) or os.path.lexists(target):
            continue
        os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.mkdir(target, 0o755)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(path, target, None, BIND | REC)
        set_read_only(target, RECURSIVE)
    os.makedirs(root + HOME)
    owner = 1000 if user is None else user
    size = f"size={limits['folder_bytes']},nr_inodes={limits['files']}"
    mount("none", root + HOME, "tmpfs", NOSUID | NODEV, f"mode=700,uid={owner},gid={owner},{size}")
    os.chdir(root)
    call("pivot_root", b".", b".")
    call("umount2", b".", DETACH)
    os.chdir("/")
    set_read_only("/", 0)  # /tmp stays writable


def landlock_version() -> int:
    """The ABI version of the kernel's Landlock; 0 without it."""
    return max(0, int(LIBC.syscall(SYS_LANDLOCK, None, ctypes.c_size_t(0), 1)))


def landlock(job: Job) -> None:
    """Deny this process all files but the interpreter (read-only) and its folder, and TCP and signals to other processes.

    TCP from version 4 (Linux 6.7), signals and abstract sockets from version 6 (Linux 6.12).
    """
    version = landlock_version()
    if not version:
        raise OSError("the kernel has no Landlock")
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    rules = struct.pack("=QQQ", handled, 0b11, 0b11)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = call("syscall", SYS_LANDLOCK, rules, ctypes.c_size_t(len(rules)), 0)
    granted = [(path, READ) for path in (*SYSTEM, *job["readable"])] + [(path, READ | WRITE_FILE) for path in DEVICES]
    for path, rights in [*granted, (job["folder"], handled)]:
        if not os.path.exists(path):
            continue
        handle = os.open(path, os.O_PATH)
        rights &= handled if os.path.isdir(path) else handled & FILE_RIGHTS
        call("syscall", SYS_LANDLOCK + 1, ruleset, 1, struct.pack("=Qi", rights, handle), 0)
        os.close(handle)
    call("syscall", SYS_LANDLOCK + 2, ruleset, 0)
    os.close(ruleset)


def process_count() -> int:
    """Number of this user's threads on the machine, which RLIMIT_NPROC counts when the program shares its user."""
    count = 0
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == os.geteuid():
                count += len(os.listdir(f"/proc/{entry.name}/task"))
    return count


def set_limits(limits: dict[str, Any], others: int) -> None:
    """Resource limits of this process and its children; `others` is the number of processes that its user has already."""
    cpu = max(1, round(limits["cpu_seconds"]))
    for name, value in (
        ("CORE", 0),
        ("CPU", cpu),
        ("AS", limits["memory_bytes"]),
        ("FSIZE", limits["file_bytes"]),
        ("NOFILE", limits["open_files"]),
        ("NPROC", others + limits["processes"]),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
    ):
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        above = cpu + 1 if name == "CPU" else soft  # SIGKILL for a program that ignores SIGXCPU
        resource.setrlimit(kind, (soft, above if hard == resource.RLIM_INFINITY else min(above, hard)))


def interpreter(job: Job, user: int | None) -> str:
    """The path of Python; for a spare user through a descriptor, since root's Python may lie in an inaccessible folder."""
    python: str = job["python"]
    if user is None or job["level"] == "namespaces":
        return python
    prefix = os.path.dirname(os.path.dirname(python))
    handle = os.open(prefix, os.O_PATH)
    os.set_inheritable(handle, True)
    return f"/proc/self/fd/{handle}/{os.path.relpath(python, prefix)}"


def become_program(job: Job, user: int | None, others: int) -> NoReturn:
    """Drop all privileges and start the program in this process."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    prctl(NO_NEW_PRIVS, 1)
    home = HOME if job["level"] == "namespaces" else job["folder"]
    python = interpreter(job, user)
    os.chdir(home)
    if job["level"] == "landlock":
        landlock(job)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    prctl(PDEATHSIG, signal.SIGKILL)  # a change of user would clear it
    set_limits(job["limits"], others)
    for handle in (job["source"], job["verdict"]):
        os.set_inheritable(handle, True)
    # A fixed hash seed: the order of a set must not decide a score.
    names = {"HOME": home, "TMPDIR": home, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    flags = ["-s", "-S", "-P", "-B", "-X", "utf8", "-c", job["runner"]]
    os.execve(python, [python, *flags, str(job["source"]), str(job["verdict"])], names)


def fork_program(job: Job, user: int | None, others: int) -> int:
    """Start the program in a child process; errors before its first line are reported."""
    child = os.fork()
    if child:
        return child
    try:
        become_program(job, user, others)
    except BaseException as error:
        report(job, error=f"{type(error).__name__}: {error}")
    finally:
        os._exit(125)


def await_child(child: int) -> int | None:
    """The wait status of `child`; None on SIGTERM. Reaps orphans meanwhile. Needs SIGCHLD and SIGTERM blocked."""
    while True:
        if signal.sigwait({signal.SIGCHLD, signal.SIGTERM}) == signal.SIGTERM:
            return None
        while True:
            reaped, status = os.waitpid(-1, os.WNOHANG)
            if reaped == child:
                return status
            if not reaped:
                break


def children_of(root: int) -> list[int]:
    """All descendants of a process, by /proc."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as handle:
            parents[int(name)] = int(handle.read().rpartition(")")[2].split()[1])
    family = {root}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sorted(family - {root})


def sweep(user: int | None) -> bool:
    """Kill all processes that the program left; whether all are gone. With namespaces the kernel does that instead."""
    deadline = time.monotonic() + SWEEP_SECONDS
    while time.monotonic() < deadline:
        if user is None:
            for child in children_of(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        elif not (killer := os.fork()):
            try:
                os.setresuid(user, user, user)
                os.kill(-1, signal.SIGKILL)  # everything of this user in one step: no fork slips through
            finally:
                os._exit(0)
        else:
            os.waitpid(killer, 0)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        time.sleep(0.005)
    return False


def report(job: Job, **facts: Any) -> None:
    """Report to the caller, a JSON line; if the caller is dead, cleaning up goes on."""
    with contextlib.suppress(BrokenPipeError):
        os.write(job["report"], json.dumps(facts).encode() + b"\n")


def first_process(job: Job, user: int | None) -> NoReturn:
    """Process 1 of the namespace: builds the root and starts the program; when it ends, the kernel kills the rest."""
    try:
        prctl(PDEATHSIG, signal.SIGKILL)
        private_root(job, user)
        child = fork_program(job, user, 0)
        prctl(DUMPABLE, 0)  # the program may have the same user: it shall not trace this process
        report(job, status=await_child(child))
    except BaseException as error:
        report(job, error=f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)


def main() -> None:
    """Run the job of the first argument."""
    job: Job = json.loads(sys.argv[1])
    for handle in (job["report"], job["source"], job["verdict"]):
        os.set_inheritable(handle, False)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    try:
        prctl(PDEATHSIG, signal.SIGTERM)
        if os.getppid() != job["parent"]:
            return
        prctl(SUBREAPER, 1)
        user = spare_user()
        report(job, user=user is not None, landlock=landlock_version())
        if job["level"] == "namespaces":
            enter_namespaces(user)
            if not (child := os.fork()):
                first_process(job, user)
        else:
            if user is not None:
                os.chown(job["folder"], user, user)
            child = fork_program(job, user, process_count() if user is None else 0)
        prctl(DUMPABLE, 0)
        status = await_child(child)
        if job["level"] != "namespaces":
            report(job, status=status)
            report(job, clean=sweep(user))
        elif status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)  # returns when the whole namespace is dead
    except BaseException as error:
        report(job, error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
