"""Sentence splitting for lm-eval's IFEval and RULER: a fallback for the data of nltk's punkt, where that is not available.

Owns `nltk_data`: punkt's English data reduced to the most common abbreviations. The algorithm is nltk's own. Where the real
data is installed, nothing changes. lm-eval downloads it too, but waits for minutes where a network does not answer.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "nltk_data"
SPLITTING = ("ifeval", "leaderboard", "niah", "ruler")
"""Parts of the names of lm-eval's tasks that split sentences."""
NOTE = (
    "sentences are split by nltk's punkt with a short list of abbreviations, since its own data (punkt_tab) is absent; "
    "install it with: python -m nltk.downloader punkt_tab"
)


def ensure_punkt(tasks: Iterable[str] = SPLITTING, *, seconds: float = 20.0) -> str | None:
    """Make nltk able to split English sentences in this process: with its own data, downloaded if absent, else with ours.

    Args:
        tasks: names in lm-eval; nothing is done for tasks that split no sentences.
        seconds: timeout of the download, which is tried once in a process.

    Returns:
        A note for the results; None where sentences are split as by lm-eval.
    """
    if not any(part in name for name in tasks for part in SPLITTING) or importlib.util.find_spec("nltk") is None:
        return None
    import nltk

    if not _is_installed():
        download_punkt(seconds)
    if _is_installed():
        return None
    if str(FOLDER) not in nltk.data.path:
        nltk.data.path.append(str(FOLDER))
    return NOTE


def _is_installed() -> bool:
    """Whether nltk has punkt's own English data."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/", [path for path in nltk.data.path if path != str(FOLDER)])
    except LookupError:
        return False
    return True


@cache
def download_punkt(seconds: float) -> None:
    """Try to download punkt's data, in a process of its own: nltk has no timeout."""
    command = [sys.executable, "-m", "nltk.downloader", "-q", "punkt_tab"]
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False)
