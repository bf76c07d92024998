"""What holds for every test: the same examples of Hypothesis each time, and a Ctrl-C that interrupts.

No example has a deadline, which a busy machine would miss.
"""

from __future__ import annotations

import signal

from hypothesis import settings

settings.register_profile("unmask", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("unmask")

# Shells start jobs in the background with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
