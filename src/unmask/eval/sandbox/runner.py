"""Sandbox runner: executes the untrusted program as `__main__` and reports whether its last line was reached.

Executed by `launcher.py` as the text of `python -c`, so it imports the standard library only. The secret word that proves the
end is read before the program starts and kept in a local variable of this frame: a program that leaves early, prints, or
replaces `os.write` and `sys.exit` cannot report it. A program that searches its own process for the word can: nothing in the
same process could prevent that.
"""

import builtins
import sys
import types
from _sitebuiltins import Quitter
from posix import close, getpid, write


def main(job: int, verdict: int) -> None:
    """Run the program that follows the secret word in `job`; write the word to `verdict` when its end is reached."""
    with open(job, "rb") as handle:
        word, source = handle.read(32), handle.read()
    module = types.ModuleType("__main__")
    sys.modules["__main__"], sys.argv = module, ["program.py"]
    builtins.__dict__.update(exit=Quitter("exit", "Ctrl-D"), quit=Quitter("quit", "Ctrl-D"))  # -S leaves them out
    send, current, leave, me, show = write, getpid, close, getpid(), sys.__excepthook__
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        if isinstance(error, MemoryError):
            send(verdict, b"memory")
        show(type(error), error.with_traceback(error.__traceback__ and error.__traceback__.tb_next), error.__traceback__)
        raise SystemExit(1) from None
    if current() == me:  # the end reached by a fork proves nothing about the program
        send(verdict, word)
        leave(verdict)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
