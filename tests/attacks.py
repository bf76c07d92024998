"""Programs that try to escape from the sandbox, and how each must end.

Each gets a JSON object on stdin: `secret` (a file anybody may read), `outside` (a folder anybody may write to), `port` (a
listener on loopback), `victim` (a process). "passed" means that it did not get out: the program itself asserts that.
"""

from typing import NamedTuple

GIVEN = "import json, os, sys, time\ngiven = json.load(sys.stdin)\n"


class Attack(NamedTuple):
    source: str
    status: str
    needs: str | None = None
    """The attribute of Isolation without which it would succeed (and must not be tried)."""


def refused(action: str, errors: str = "OSError") -> str:
    return f"{GIVEN}\ntry:\n    {action}\nexcept {errors}:\n    print('refused')\nelse:\n    raise SystemExit('it worked')\n"


ATTACKS = {
    "reads home": Attack(refused("open(given['secret']).read()"), "passed", "files"),
    "lists home": Attack(refused("os.listdir(os.path.dirname(given['secret']))"), "passed", "files"),
    "writes outside": Attack(refused("open(given['outside'] + '/file', 'w')"), "passed", "files"),
    "writes to shared memory": Attack(refused("open('/dev/shm/unmask-attack', 'w')"), "passed", "files"),
    "changes the interpreter": Attack(refused("open(os.__file__, 'a')"), "passed", "files"),
    "connects": Attack(
        refused("import socket; socket.create_connection(('127.0.0.1', given['port']), 5)"), "passed", "network"
    ),
    "kills a process": Attack(refused("os.kill(given['victim'], 9)"), "passed", "signals"),
    "kills everybody": Attack("import os, signal\ntry:\n    os.kill(-1, 15)\nexcept OSError:\n    pass\n", "passed", "signals"),
    "kills its group": Attack("import os\nos.kill(0, 9)\n", "killed", "signals"),
    "kills its parent": Attack(
        "import os\ntry:\n    os.kill(os.getppid(), 9)\nexcept OSError:\n    pass\n", "passed", "signals"
    ),
    "fork bomb": Attack(
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n", "timeout", "forks"
    ),
    "fork bomb of daemons": Attack(
        "import os\nwhile True:\n    try:\n        os.fork() or os.setsid()\n    except OSError:\n        pass\n",
        "timeout",
        "forks",
    ),
    "daemon": Attack(
        "import os, time\n"
        "if not os.fork():\n    os.setsid()\n    if not os.fork():\n        time.sleep(600)\n    os._exit(0)\nos.wait()\n",
        "passed",
    ),
    "chain of forks": Attack(
        "import os\nif not os.fork():\n    os.setsid()\n    while True:\n        if os.fork():\n            os._exit(0)\n",
        "passed",
        "complete_kill",
    ),
    "infinite output": Attack("while True:\n    print('x' * 1000)\n", "output"),
    "infinite errors": Attack("import sys\nwhile True:\n    sys.stderr.write('x' * 1000)\n", "output"),
    "infinite loop": Attack("10 ** 10 ** 9\n", "timeout"),
    "ignores the processor limit": Attack(
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    pass\n", "killed"
    ),
    "sleeps": Attack("import time\ntime.sleep(600)\n", "timeout"),
    "ignores signals": Attack(
        "import signal, time\nfor number in (1, 2, 3, 15):\n    signal.signal(number, signal.SIG_IGN)\ntime.sleep(600)\n",
        "timeout",
    ),
    "memory": Attack("x = [0]\nwhile True:\n    x = x * 2\n", "memory"),
    "huge file": Attack(refused("[open('big', 'ab').write(bytes(1 << 20)) for _ in range(40)]"), "passed"),
    "crash": Attack("import ctypes\nctypes.string_at(0)\n", "killed"),
    "deep recursion": Attack("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()\n", "killed|memory|timeout"),
    "leaves early": Attack("import os\nos._exit(0)\nassert False\n", "exited"),
    "exits early": Attack("exit()\nassert False\n", "exited"),
    "exit code": Attack("import sys\nsys.exit(3)\n", "failed"),
    "exits early in a hook": Attack(
        "import os, sys\nsys.excepthook = sys.__excepthook__ = lambda *_: os._exit(0)\nassert False\n", "failed"
    ),
    "patches exits": Attack(
        "import os, sys\nsys.exit = os._exit = lambda *_: None\nos.write = lambda fd, data: len(data)\nassert False\n", "failed"
    ),
    "patches assertions": Attack("import builtins\nbuiltins.AssertionError = SystemExit\nassert False\n", "failed"),
    "lets a child pass": Attack("import os\nif os.fork():\n    os.wait()\n    os._exit(0)\n", "exited"),
    "prints that it passed": Attack(
        "import os\nprint('passed', 'f' * 32)\nfor fd in range(3, 64):\n    try:\n        os.write(fd, b'f' * 32)\n"
        "    except OSError:\n        pass\nos._exit(0)\n",
        "exited",
    ),
    "closes all": Attack("import os\nos.closerange(0, 64)\nos._exit(0)\n", "exited"),
    "wrong syntax": Attack("def f(:\n", "failed"),
    "NUL": Attack("x = 1\0\n", "failed"),
    "no Unicode": Attack("x = '\ud800'\n", "failed"),
}
