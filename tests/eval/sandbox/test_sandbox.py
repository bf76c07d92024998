"""The sandbox against programs that attack it, at every level this machine permits, as root and as nobody."""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from attacks import ATTACKS
from helpers import refused
from unmask.errors import BackendError, ConfigError, UnmaskWarning
from unmask.eval.sandbox import isolation as levels
from unmask.eval.sandbox import process
from unmask.eval.sandbox.isolation import Isolation, isolation, probe
from unmask.eval.sandbox.launcher import children_of
from unmask.eval.sandbox.process import Limits
from unmask.eval.sandbox.programs import run_many, run_program

pytestmark = pytest.mark.filterwarnings("default::unmask.errors.UnmaskWarning")
LEVELS = ("namespaces", "landlock", "limits")
SHORT = Limits(seconds=1.0, cpu_seconds=1.0, output_bytes=5000, memory_bytes=128 << 20)
PATIENT = Limits(seconds=60.0, cpu_seconds=20.0)
SLOW = ("fork bomb", "fork bomb of daemons", "sleeps", "ignores signals")
"""End by the clock alone: the others get a minute, for a busy machine."""
WEAK = [name for name in ATTACKS if ATTACKS[name].needs and name != "fork bomb"] + ["daemon", "memory", "huge file", "sleeps"]
"""What the level matters for; the rest is tried at the best one."""
CASES = [(level, name) for level in LEVELS for name in (ATTACKS if level == "namespaces" else WEAK)]
SOURCES = Path(process.__file__).parents[3]


@pytest.fixture(params=LEVELS)
def walls(request: pytest.FixtureRequest) -> Isolation:
    try:
        return probe(request.param)
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """Every process that loses its parent becomes ours: after each test there must be none, and no folder."""
    libc = ctypes.CDLL(None)
    libc.prctl(36, 1, 0, 0, 0)
    before = set(children_of(os.getpid()))
    yield
    deadline = time.monotonic() + 10
    while (left := set(children_of(os.getpid())) - before) and time.monotonic() < deadline:
        for child in left:
            try:
                os.waitpid(child, os.WNOHANG)
            except ChildProcessError:
                continue
        time.sleep(0.01)
    libc.prctl(36, 0, 0, 0, 0)
    assert not left
    assert not list(Path(tempfile.gettempdir()).glob(f"unmask-sandbox-{os.getpid()}-*"))


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A home with a secret, a folder for everybody, a listener and a process to kill: what attacks are told of."""
    place = Path(tempfile.mkdtemp(dir="/var/tmp"))
    place.chmod(0o755)
    (place / "secret").write_text("the secret")
    (place / "outside").mkdir()
    (place / "outside").chmod(0o777)
    monkeypatch.setenv("HOME", str(place))
    victim = subprocess.Popen(["sleep", "600"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        names = {"secret": str(place / "secret"), "outside": str(place / "outside"), "victim": victim.pid}
        yield json.dumps({**names, "port": listener.getsockname()[1]})
        assert victim.poll() is None
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert not list((place / "outside").iterdir())
    assert not Path("/dev/shm/unmask-attack").exists()
    victim.kill()
    victim.wait()
    shutil.rmtree(place)


def holds(walls: Isolation, need: str | None) -> bool:
    return need is None or (walls.network != "open" if need == "network" else bool(getattr(walls, need)))


@pytest.mark.parametrize(("walls", "name"), CASES, indirect=["walls"])
def test_attack_fails(walls: Isolation, name: str, request: pytest.FixtureRequest) -> None:
    attack = ATTACKS[name]
    if not holds(walls, attack.needs):
        pytest.skip(f"{walls.level} does not promise {attack.needs}")
    stdin = request.getfixturevalue("given") if attack.needs or "given" in attack.source else ""
    limits = Limits(**{**SHORT.__dict__, "seconds": 1.0 if name in SLOW else 60.0})
    outcome = run_program(attack.source, stdin=stdin, limits=limits, level=walls.level)
    assert outcome.status in attack.status.split("|"), outcome
    assert len(outcome.stdout) <= SHORT.output_bytes
    assert len(outcome.stderr) <= SHORT.output_bytes
    if "refused" in attack.source:
        assert outcome.stdout == "refused\n"
    if name in SLOW:
        assert 0.9 < outcome.seconds < 1.0 + process.GRACE


AS_NOBODY = """
import json, sys, warnings
warnings.simplefilter("ignore")
from unmask.errors import BackendError
from unmask.eval.sandbox.isolation import probe
from unmask.eval.sandbox.process import Limits
from unmask.eval.sandbox.programs import run_program
attacks, given = json.load(sys.stdin)
for level in ("namespaces", "landlock", "limits"):
    try:
        walls = probe(level)
    except BackendError:
        continue
    ends = {}
    for name, (source, status, needs) in attacks.items():
        if needs is None or getattr(walls, needs) not in (False, "open"):
            limits = Limits(seconds=0.5 if status == "timeout" else 60.0, memory_bytes=1 << 27)
            ends[name] = run_program(source, stdin=given, limits=limits, level=level).status
    print(json.dumps([level, ends]))
"""


def nobody() -> list[str]:
    """A command that runs a Python as nobody."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("root and setpriv are needed to become nobody")
    for python in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", python, "-B"]
        check = [
            *command,
            "-c",
            "import sys, unmask.eval.sandbox.programs; assert sys.version_info >= (3, 11); open(sys.executable)",
        ]
        if not subprocess.run(check, env={"PYTHONPATH": str(SOURCES)}, cwd="/", capture_output=True).returncode:
            return command
    pytest.skip("nobody can run no Python that is recent enough")


def test_attacks_fail_as_nobody(given: str) -> None:
    payload = json.dumps([{name: ATTACKS[name] for name in WEAK}, given])
    run = subprocess.run(
        [*nobody(), "-c", AS_NOBODY], input=payload, env={"PYTHONPATH": str(SOURCES)}, cwd="/", capture_output=True, text=True
    )
    assert not run.returncode, run.stderr
    found = dict(map(json.loads, run.stdout.splitlines()))
    assert found["limits"].keys() == {name for name in WEAK if ATTACKS[name].needs in (None, "forks")}
    for level, ends in found.items():
        assert {name: ATTACKS[name].status for name in ends} == ends, level


def test_processes_are_counted(walls: Isolation) -> None:
    if not walls.forks:
        pytest.skip("not promised")
    source = (
        "import os, time\nfor count in range(1000):\n    try:\n        if not os.fork():\n            time.sleep(600)\n"
        "    except BlockingIOError:\n        break\nprint(count)\n"
    )
    outcome = run_program(source, limits=Limits(seconds=60.0, processes=7), level=walls.level)
    assert outcome.status == "passed"
    assert int(outcome.stdout) == 6 or (os.geteuid() and walls.level != "namespaces")


def test_files_in_memory_are_bounded() -> None:
    if isolation().level != "namespaces":
        pytest.skip("only namespaces promise that")
    many = "for number in range(10**5):\n    open(str(number), 'w').close()\n"
    outcome = run_program(many, limits=Limits(seconds=60.0, files=100))
    assert outcome.status == "failed"
    assert "No space left" in outcome.stderr
    large = "for number in range(10):\n    open(str(number), 'wb').write(bytes(1 << 20))\n"
    assert "No space left" in run_program(large, limits=Limits(seconds=60.0, folder_bytes=5 << 20)).stderr
    assert run_program(large, limits=PATIENT).status == "passed"


def test_any_folder_is_removed(walls: Isolation) -> None:
    source = (
        "import os\nos.mkdir('closed')\nopen('closed/file', 'w').close()\nos.chmod('closed', 0)\n"
        "for _ in range(200):\n    os.mkdir('d' * 50)\n    os.chdir('d' * 50)\n"
    )
    assert run_program(source, limits=PATIENT, level=walls.level).status == "passed"


def test_program_starts_with_nothing(walls: Isolation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    source = (
        "import os, sys\nfound = []\nfor fd in range(3, 1000):\n    try:\n        found.append(os.fstat(fd).st_ino)\n"
        "    except OSError:\n        pass\n"
        "print(found, os.listdir(), sorted(os.environ), os.getcwd() == os.environ['HOME'], os.getuid() != 0, sep='|')\n"
    )
    with open(tmp_path / "open", "w") as handle:
        os.set_inheritable(handle.fileno(), True)
        outcome = run_program(source, limits=PATIENT, level=walls.level)
        files, folder, names, *facts = outcome.stdout.strip().split("|")
        assert os.fstat(handle.fileno()).st_ino not in json.loads(files)
    assert len(json.loads(files)) <= 2  # the pipe for its verdict; root without namespaces: the interpreter's folder
    assert (folder, facts) == ("[]", ["True", "True"])
    assert names == "['HOME', 'LANG', 'PATH', 'PYTHONHASHSEED', 'TMPDIR']"


def test_program_is_an_ordinary_main_module(walls: Isolation) -> None:
    source = (
        "from dataclasses import dataclass\nimport sys, tempfile, threading\n@dataclass\nclass A:\n    x: 'int'\n"
        "thread = threading.Thread(target=lambda: print(A(1), __name__, sys.argv))\nthread.start()\nthread.join()\n"
        "tempfile.TemporaryFile().write(b'x')\nprint(len(sys.stdin.read()), flush=True)\nsys.stdout.buffer.write(b'\\xff\\n')\n"
        "sys.stdout.flush()\nimport os\nos.close(1)\n"
    )
    outcome = run_program(source, stdin="é" * 500_000, limits=PATIENT, level=walls.level)
    assert (outcome.status, outcome.stdout) == ("passed", "A(x=1) __main__ ['program.py']\n500000\n�\n")
    trace = run_program("def f():\n    1 / 0\nf()\n", limits=PATIENT).stderr
    assert [line for line in trace.splitlines() if "File" in line] == [
        '  File "program.py", line 3, in <module>',
        '  File "program.py", line 2, in f',
    ]


def test_outcome_has_code_or_signal() -> None:
    outcome = run_program("import sys\nprint('a')\nsys.exit(300 % 256)\n", limits=PATIENT)
    assert (outcome.status, outcome.exit_code, outcome.signal, outcome.stdout) == ("failed", 44, None, "a\n")
    outcome = run_program("import os\nos.abort()\n", limits=PATIENT)
    assert (outcome.status, outcome.exit_code, outcome.signal) == ("killed", None, 6)


def test_many_programs_keep_their_order() -> None:
    programs = [f"print({number})" if number % 3 else "1 / 0" for number in range(7)]
    outcomes = run_many(programs, limits=PATIENT)
    assert [outcome.stdout for outcome in outcomes] == ["", "1\n", "2\n", "", "4\n", "5\n", ""]
    assert [outcome.status for outcome in outcomes][:2] == ["failed", "passed"]
    assert run_many([]) == []


def test_death_of_the_caller_ends_the_program(walls: Isolation) -> None:
    source = "import os, time\nprint(flush=True)\nos.fork()\nos.fork()\ntime.sleep(600)\n"
    call = f"run_program({source!r}, limits=Limits(seconds=600), level={walls.level!r})"
    code = f"from unmask.eval.sandbox.programs import *\n{call}"
    caller = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SOURCES)})
    deadline = time.monotonic() + 30
    while len(children_of(caller.pid)) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(children_of(caller.pid)) >= 5
    folders = set(Path(tempfile.gettempdir()).glob(f"unmask-sandbox-{caller.pid}-*"))
    caller.kill()
    caller.wait()
    for folder in folders:  # nobody is left to remove it
        shutil.rmtree(folder)


def test_death_of_the_launcher_ends_everything() -> None:
    if isolation().level != "namespaces":
        pytest.skip("only namespaces promise that")
    ended = []
    source = "import os, time\nos.fork()\nos.setsid() if os.fork() == 0 else None\ntime.sleep(600)\n"
    before = set(children_of(os.getpid()))
    thread = threading.Thread(target=lambda: ended.append(run_program(source, limits=PATIENT)))
    thread.start()
    while len(found := set(children_of(os.getpid())) - before) < 6 and thread.is_alive():
        time.sleep(0.02)
    launcher = max(found, key=lambda child: len(children_of(child)))
    os.kill(launcher, signal.SIGKILL)
    thread.join()
    assert ended[0].status == "killed"
    assert ended[0].seconds < PATIENT.seconds


def test_root_is_read_only_whoever_owns_it() -> None:
    if isolation().level != "namespaces":
        pytest.skip("files are protected otherwise")
    source = (
        "import os, sys\nplaces = ['/', '/usr', '/dev/null', os.__file__, sys.executable]\n"
        "assert all(os.statvfs(place).f_flag & os.ST_RDONLY for place in places)\n"
        "assert sorted(os.listdir('/tmp')) == []\nassert not os.path.exists('/proc/self')\n"
        "import ctypes\nassert os.getuid() != 0 and ctypes.CDLL(None).prctl(39, 0, 0, 0, 0) == 1  # no new privileges\n"
        "try:\n    os.chroot('/tmp')\nexcept PermissionError:\n    pass\nelse:\n    raise SystemExit(1)\n"
    )
    assert run_program(source, limits=PATIENT).status == "passed"


def test_stuck_launcher_does_not_hang_the_caller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stuck = tmp_path / "stuck.py"
    stuck.write_text("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)\n")
    monkeypatch.setattr(process, "LAUNCHER", stuck)
    monkeypatch.setattr(process, "GRACE", 0.3)
    outcome = run_program("", limits=Limits(seconds=0.5), level="limits")
    assert outcome.status == "timeout"
    assert outcome.seconds < 20


def test_broken_launcher_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process, "LAUNCHER", tmp_path / "absent.py")
    with refused(BackendError, "killed"):
        probe("limits")
    monkeypatch.undo()
    monkeypatch.setattr(process, "asdict", lambda _: {})
    with refused(BackendError, "'cpu_seconds'"):
        run_program("", level="limits")


def test_isolation_falls_back_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    weak = Isolation("landlock", "no TCP", files=True, signals=False, forks=True, complete_kill=True)

    def denied(level: str) -> Isolation:
        if level == "namespaces":
            raise BackendError("not permitted")
        return weak

    monkeypatch.setattr(levels, "probe", denied)
    isolation.cache_clear()
    with pytest.warns(UnmaskWarning, match=r"landlock.*network.*processes"):
        assert isolation() == weak
    assert isolation() == weak
    isolation.cache_clear()


def test_limits_are_checked() -> None:
    with refused(ConfigError, "processes", 0):
        Limits(processes=0)
