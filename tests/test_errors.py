"""The wording of errors, once for every class: value, rule and remedy in one line. Other tests check class and names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from unmask.data.shapes import Fields, read_example
from unmask.diffusion.blocks import BlockSchedule, Phase
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import BackendError, CheckpointError, ConfigError, DataError, RequestError, TrainingError, UnmaskError
from unmask.files import read_json
from unmask.models.native.library import find_kernels
from unmask.train.state import save_checkpoint


class State:
    """As much of a training state as a checkpoint's name needs."""

    def __init__(self, step: int) -> None:
        self.step = step


CAUSES: list[tuple[type[UnmaskError], Callable[[Path], object], str]] = [
    (
        ConfigError,
        lambda path: BlockSchedule((Phase("warmup", 32, 1),)).check_row_length(100),
        "row length 100 is not a multiple of block size 32; use 96 or 128",
    ),
    (
        CheckpointError,
        lambda path: read_json(path / "config.json"),
        "{path}/config.json does not exist; give a folder in the Hugging Face layout",
    ),
    (DataError, lambda path: read_example({"text": 3}, Fields()), "field text holds int, not a text; give a string"),
    (
        TrainingError,
        lambda path: save_checkpoint(path / "file", State(1), {}, None, None),  # type: ignore[arg-type]
        "checkpoint {path}/file/checkpoints/step-0000001 cannot be written",
    ),
    (RequestError, lambda path: SamplingParams(threshold=1.5), "threshold is 1.5; it must lie in [0, 1]"),
    (
        BackendError,
        lambda path: find_kernels(path, machine="x86_64"),
        "the CPU kernels are not built; install unmask from a wheel",
    ),
]


@pytest.mark.parametrize(("error", "cause", "message"), CAUSES)
def test_value_rule_and_remedy_in_one_line(
    error: type[UnmaskError],
    cause: Callable[[Path], object],
    message: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(error) as caught:
        cause(tmp_path)
    assert str(caught.value).startswith(message.format(path=tmp_path))
