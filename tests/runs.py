"""A tiny checkpoint folder, a tiny data file and a tiny recipe: everything a whole training run needs, in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers import make_tokenizer
from tiny import tiny_model
from unmask.models.weights.checkpoint import save_model
from unmask.train.metrics import MetricRecord, read_metrics
from unmask.train.recipe import Recipe, parse_recipe
from unmask.train.speed import speed_figures


def tiny_folder(folder: Path, *, family: str = "llama", **changes: Any) -> Path:
    """A random autoregressive model with tokenizer and chat template, as a Hugging Face folder."""
    tokenizer = make_tokenizer(folder)
    model = tiny_model(
        family,
        std=0.2,
        vocab_size=tokenizer.vocab_size,
        eos_ids=tuple(sorted(tokenizer.eos_ids)),
        pad_id=tokenizer.pad_id,
        **{"max_positions": 256, "tied_head": True, **changes},
    )
    save_model(model, folder)
    return folder


def tiny_jsonl(path: Path, count: int = 40) -> Path:
    """Question-answer pairs, a few tokens each."""
    lines = [json.dumps({"prompt": f"say {i}", "response": f"{i} and {i + 1}, then {i * 7 % 13}"}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_preferences(path: Path, count: int = 24) -> Path:
    """Pairs of answers that differ in their wording."""
    lines = [
        json.dumps({"prompt": f"say {i}", "chosen": f"{i} and {i + 1}", "rejected": f"no, not {i * 3 % 11}"})
        for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def stage_recipe(model: Path, data: Path, *, objective: dict[str, Any] | None = None, **train: Any) -> Recipe:
    """Fine-tuning at block size 8; some ten steps. `train`: keys of that section."""
    values = tiny_values(model, data)
    del values["schedule"]
    values["data"] |= {"overlong": "truncate", "validation_share": 0.2}
    values["objective"] = {"kind": "denoise", **(objective or {})}
    if values["objective"]["kind"] == "denoise":
        values["objective"] = {"mask_noise_steps": 0, **values["objective"]}
    values["train"] |= {"tokens": 1500, **train}
    return parse_recipe(values, "test")


def tiny_recipe(model: Path, data: Path, **train: Any) -> Recipe:
    """Warmup 1 -> 4, whole sequence, decay 16 -> 8; some twenty steps."""
    return parse_recipe(tiny_values(model, data, **train), "test")


def tiny_values(model: Path, data: Path, **train: Any) -> dict[str, Any]:
    """The values of `tiny_recipe`."""
    return {
        "model": str(model),
        "decode_block_size": 8,
        "data": {
            "row_length": 64,
            "validation_share": 0.1,
            "validation_rows": 2,
            "sources": [{"kind": "jsonl", "path": str(data), "eos_fill": 8}],
        },
        "schedule": {
            "warmup": [{"block_size": 1, "share": 0.2}, {"block_size": 4, "share": 0.2}],
            "stable": 0.2,
            "decay": [{"block_size": 16, "share": 0.2}, {"block_size": 8, "share": 0.2}],
        },
        "objective": {"kind": "denoise", "mask_noise_steps": 4},
        "train": {
            "tokens": 3000,
            "batch_rows": 4,
            "micro_rows": 2,
            "learning_rate": 3e-3,
            "warmup_steps": 2,
            "compute_dtype": "float32",
            "device": "cpu",
            "eval_every": 5,
            "checkpoint_every": 3,
            **train,
        },
    }


def untimed_records(run: Path) -> list[MetricRecord]:
    """The metric records of a run without what differs from run to run: speed and memory."""
    timing = speed_figures(1, 1.0, [1])
    return [
        {name: value for name, value in record.items() if name not in timing} for record in read_metrics(run / "metrics.jsonl")
    ]


def train_losses(run: Path) -> dict[int, float]:
    """The loss of each training step of a run."""
    return {record["step"]: record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"}
