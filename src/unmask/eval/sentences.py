"""Sentences for lm-eval's IFEval and RULER, which split them with nltk's punkt, where punkt's data cannot be had.

Owns `nltk_data`: punkt's English data cut down to the commonest abbreviations. The algorithm stays nltk's own. Changes nothing
where the real data is there.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "nltk_data"
SPLITTING = ("ifeval", "leaderboard", "niah", "ruler")
"""Parts of the names of lm-eval's tasks that split sentences."""
NOTE = (
    "sentences are split by nltk's punkt with a short list of abbreviations, for its own data (punkt_tab) is absent; "
    "with a network: python -m nltk.downloader punkt_tab"
)


def ensure_punkt(tasks: Iterable[str] = SPLITTING, *, seconds: float = 20.0) -> str | None:
    """See to it that nltk can split English sentences in this process.

    Data that is absent is downloaded, as lm-eval would; where that fails or takes too long, ours stands in for it.

    Args:
        tasks: names in lm-eval; nothing is done for those that split no sentences.
        seconds: most time that the download may take; it is tried once in a process.

    Returns:
        What results must say of their sentences; None where nothing differs from lm-eval.
    """
    if not any(part in name for name in tasks for part in SPLITTING) or importlib.util.find_spec("nltk") is None:
        return None
    import nltk

    if not _is_there():
        _download(seconds)
    if _is_there():
        return None
    if str(FOLDER) not in nltk.data.path:
        nltk.data.path.append(str(FOLDER))
    return NOTE


def _is_there() -> bool:
    """Whether nltk has punkt's own English data."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/", [path for path in nltk.data.path if path != str(FOLDER)])
    except LookupError:
        return False
    return True


@cache
def _download(seconds: float) -> None:
    """Try it in a process of its own: nltk may wait minutes for a network that does not answer, and nothing in it stops it."""
    script = "import nltk; nltk.download('punkt_tab', quiet=True)"
    try:
        subprocess.run(
            [sys.executable, "-c", script], stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return
