"""The last thing that runs before a stranger's program: executes it as `__main__` and says whether its end was reached.

Owns nothing but that; started by `sandbox_launcher.py` as the text of `python -c`, so it imports the standard library
only. The word that proves the end is read before the program starts and kept in a local variable of this frame: a program
that leaves early, prints, or replaces `os.write` and `sys.exit` does not say it. One that searches its own process for it
can: nothing in the same process could prevent that.
"""

import builtins
import sys
import types
from _sitebuiltins import Quitter
from posix import close, getpid, write


def main(job: int, verdict: int) -> None:
    """Run the program in `job`, behind the word that `verdict` is told at its end."""
    with open(job, "rb") as handle:
        word, source = handle.read(32), handle.read()
    module = types.ModuleType("__main__")
    sys.modules["__main__"], sys.argv = module, ["program.py"]
    builtins.__dict__.update(exit=Quitter("exit", "Ctrl-D"), quit=Quitter("quit", "Ctrl-D"))  # -S leaves them out
    say, who, leave, me, show = write, getpid, close, getpid(), sys.__excepthook__
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        if isinstance(error, MemoryError):
            say(verdict, b"memory")
        show(type(error), error.with_traceback(error.__traceback__ and error.__traceback__.tb_next), error.__traceback__)
        raise SystemExit(1) from None
    if who() == me:  # the end reached by a fork proves nothing about the program
        say(verdict, word)
        leave(verdict)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
