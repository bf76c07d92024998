"""What holds for every test: the same examples of Hypothesis each time, a Ctrl-C that interrupts, and one plain tokenizer.

No example has a deadline, which a busy machine would miss; and no number of drafts depends on how long a forward took.
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from helpers import make_tokenizer
from unmask.data.tokenizer import Tokenizer
from unmask.engine.costs import CostTable

settings.register_profile("unmask", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("unmask")

# Shells start jobs in the background with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What has been imported stays: to look through it for garbage again and again takes a twentieth of the tests' time."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _given_costs() -> Iterator[None]:
    """Forwards are taken to cost the same whatever they hold, so that the same requests take the same forwards; and nothing is
    read or written of what the user's own processes have learnt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unmask.engine.draft_statistics.MeasuredCosts", lambda kernels: CostTable())
        patch.setenv("UNMASK_DRAFT_STATISTICS", "0")
        yield


@pytest.fixture(scope="session")
def plain_plots() -> Iterator[None]:
    """Runs in this process leave an empty file for a plot: drawing takes half of a tiny run's time."""
    from unmask.train.metrics import read_metrics

    def plot_run(folder: Path) -> Path | None:
        if not any(record["kind"] == "train" for record in read_metrics(folder / "metrics.jsonl")):
            return None
        (folder / "loss.png").touch()
        return folder / "loss.png"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unmask.train.run.plot_run", plot_run)
        yield


@pytest.fixture
def real_plots(plain_plots: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw their plots."""
    from unmask.train.metrics import plot_run

    monkeypatch.setattr("unmask.train.run.plot_run", plot_run)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With a ChatML template and no mask token; not to be changed."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
