"""Training metrics: JSON lines, TensorBoard, a plot.

Owns these files of a run's folder. Knows nothing of models; a metric is a number with a name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from unmask.files import atomic_write, bytes_writer

MetricRecord = dict[str, Any]


class MetricLog:
    """Appends records to `metrics.jsonl` and to TensorBoard under `folder`.

    On resume, records of steps after the checkpoint are dropped: every step is in the file once.
    """

    def __init__(self, folder: Path, *, from_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        earlier = [record for record in read_metrics(self.path) if record["step"] <= from_step]
        # Completely or not at all: it is all that is known of the steps before.
        atomic_write(self.path, bytes_writer("".join(json.dumps(record) + "\n" for record in earlier).encode()))
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)

    def write(self, record: MetricRecord) -> None:
        """Append one record; it has `step` and `kind` ("train" or "validation")."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[MetricRecord]:
    """Records of a `metrics.jsonl`; a last line cut short by a crash is ignored."""
    if not path.exists():
        return []
    records: list[MetricRecord] = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def smoothed(values: Iterable[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, debiased."""
    out: list[float] = []
    total = scale = 0.0
    for value in values:
        total, scale = weight * total + (1 - weight) * value, weight * scale + (1 - weight)
        out.append(total / scale)
    return out


def plot_run(folder: Path) -> Path | None:
    """Draw loss (raw, smoothed, validation) and block size over tokens in `loss.png`; None before the first step."""
    records = read_metrics(folder / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    valid = [r for r in records if r["kind"] == "validation"]
    if not train:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, height_ratios=(3, 1), figsize=(8, 5), constrained_layout=True)
    tokens = [r["tokens"] for r in train]
    top.plot(tokens, [r["loss"] for r in train], color="0.8", linewidth=0.8, label="NELBO, batch")
    top.plot(tokens, smoothed([r["loss"] for r in train]), color="C0", label="NELBO, smoothed")
    for number, size in enumerate(dict.fromkeys(r["block_size"] for r in valid)):
        same = [r for r in valid if r["block_size"] == size]
        name = "whole sequence" if size is None else f"block {size}"
        points = ([r["tokens"] for r in same], [r["nelbo"] for r in same])
        top.plot(*points, "o-", color=f"C{number + 1}", label=f"validation, {name}")
    top.set_ylabel("nats per token")
    top.legend(fontsize="small")
    bottom.step(tokens, [r["block_size"] or r["row_length"] for r in train], where="post", color="C7")
    bottom.set_yscale("log", base=2)
    bottom.set_ylabel("block size")
    bottom.set_xlabel("tokens")
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)
    return folder / "loss.png"
