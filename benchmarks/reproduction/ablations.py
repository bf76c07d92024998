"""What each part of the recipe is worth: short runs at equal tokens that differ in one setting.

    python benchmarks/reproduction/ablations.py [--groups joint,drafts,convert,sft,cap,merge,difference] [--plot-only]

Trains what is not there yet under out/reproduction/ablations (interrupted, it goes on), scores it, and writes ablations.md and
ablations.png there. `joint`: one checkpoint for three modes. `drafts`: a gated LoRA that drafts for its parent, without scores:
the text is the parent's. `convert`: the parent to block size 32. `sft`: the first of those on worked answers. `cap`: more of
the converted child's last stage, with other weights. `merge`: means of that stage's best checkpoints. `difference`: that model
with what the control learned. Needs the data (data.py); `drafts` needs what scripts/embedded/drafts.sh writes, the last two
groups what train.sh makes.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from report import unmask

from unmask.eval.runner import load_results
from unmask.files import read_json
from unmask.train.loop import evaluate
from unmask.train.metrics import read_metrics
from unmask.train.recipe import load_recipe
from unmask.train.run import build_components

ROOT = Path("out/reproduction/ablations")
DATA = Path("out/reproduction/data")
CHILD = "smollm2-135m-converted"
CAP_STAGE = Path("out/reproduction/cap")
CONTROL = Path("out/reproduction/control_long")
AT_THE_END = ("train.eval_every=1000", "train.checkpoint_every=1000", "train.keep_checkpoints=1")
"""A short run is evaluated and saved once."""


@dataclass(frozen=True)
class Variant:
    """One model: a recipe's with `overrides`, the mean of the best `merge` checkpoints of the CAP stage, or that stage's model
    with `scale` times what the control learned."""

    group: str
    name: str
    recipe: str = ""
    verb: str = "sft"
    overrides: tuple[str, ...] = ()
    merge: int = 0
    scale: float | None = None

    @property
    def run(self) -> Path:
        return ROOT / f"{self.group}-{''.join(c if c.isalnum() or c == '.' else '-' for c in self.name)}"


def variants() -> Iterator[Variant]:
    """Every run; the first of a group is what the others differ from."""
    yield from joint_variants()
    yield from draft_variants()
    convert = {
        "WSD": (),
        "straight to 32": ("schedule={decay: [{block_size: 32, share: 1.0}]}",),
        "no document mask": ("data.document_mask=false",),
        "no mask noise": ("objective.mask_noise_steps=0",),
    }
    for name, overrides in convert.items():
        yield Variant("convert", name, "ablation_convert", "convert", overrides)
    sft = {
        "complementary pairs": (),
        "single masks": ("objective.complementary=false",),
        "four pairs": ("objective.mask_samples=4",),
        "bandwidth 0.3 to 0.8": ("objective.bandwidth=[0.3, 0.8]", "objective.sampling=bernoulli"),
        "no bandwidth, Bernoulli": ("objective.sampling=bernoulli",),
    }
    for name, overrides in sft.items():
        yield Variant("sft", name, "ablation_sft", "sft", overrides)
    short = (f"model={CHILD}", "train.tokens=20000", *AT_THE_END)
    for weight in (0.0, 0.5, 1.0, 2.0):
        yield Variant("cap", f"weight {weight:g}", "reproduction_cap", "sft", (*short, f"objective.cap.weight={weight}"))
    for count in (1, 3, 5):
        yield Variant("merge", f"top {count}", merge=count)
    for scale in (0.0, 0.5, 1.0, 1.5):
        yield Variant("difference", f"scale {scale:g}", scale=scale)


def joint_variants() -> Iterator[Variant]:
    """What the terms and settings of joint training are worth."""
    short = ("train.tokens=30000", *AT_THE_END)
    joint = {
        "lambda 0.3, rate 1e-4": (),
        "lambda 0.1": ("objective.diffusion_weight=0.1",),
        "lambda 1": ("objective.diffusion_weight=1",),
        "rate 1e-5": ("train.learning_rate=1e-5",),
        "rate 5e-5": ("train.learning_rate=5e-5",),
        "rate 2e-4": ("train.learning_rate=2e-4",),
        "align 10": ("objective.align=10",),
        "KL to the parent": ("objective.parent_kl=1",),
        "embeddings frozen": ("train.freeze_embeddings=true",),
        "drafts alone": ("objective.draft_share=1",),
        "two cuts, complementary": ("objective.cuts=2", "objective.complementary=true"),
    }
    for name, overrides in joint.items():
        yield Variant("joint", name, "reproduction_joint", "convert", (*short, *overrides))


def draft_variants() -> Iterator[Variant]:
    """What the settings and terms of draft training are worth."""

    def rank(rank: int) -> str:
        return f"train.gated_lora_rank={rank}"

    def targets(*layers: str) -> str:
        return f"train.gated_lora_targets=[{', '.join(layers)}]"

    drafts = {
        "rank 16, rate 4e-3, blocks of 4, two cuts": (),
        **{f"rank {size}": (rank(size),) for size in (4, 64, 128)},
        **{f"rate {rate}": (f"train.learning_rate={rate}",) for rate in ("2e-3", "8e-3", "1.6e-2")},
        "one cut": ("objective.cuts=1",),
        "four cuts": ("objective.cuts=4",),
        "blocks of 8": ("decode_block_size=8", "schedule={decay: [{block_size: 8, share: 1.0}]}"),
        "out and down": (targets("out", "down"),),
        "out and down, rank 64": (targets("out", "down"), rank(64)),
        "qkv and out": (targets("qkv", "out"),),
        "KL to the verify tokens, too": ("objective.kl=1",),
        "KL instead": ("objective.kl=1", "objective.nll=0"),
        "align 10": ("objective.align=10",),
        "decay 0.5": ("objective.decay=0.5",),
        "decay 1": ("objective.decay=1",),
    }
    for name, overrides in drafts.items():
        yield Variant("drafts", name, "ablation_drafts", "convert", (*AT_THE_END, *overrides))


def documents() -> None:
    """Whole documents, for pre-training: questions with their answers."""
    target = DATA / "documents.jsonl"
    if target.exists():
        return
    lines = []
    for name in ("mini5", "answers"):
        for line in (DATA / f"{name}.jsonl").read_text().splitlines():
            record = json.loads(line)
            turns = [turn["content"] for turn in record.get("messages", ())] or [record["prompt"], record["response"]]
            lines.append(json.dumps({"text": "\n\n".join(turns)}))
    partial = target.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n")
    partial.rename(target)


def train(verb: str, recipe: str, run: Path, overrides: Sequence[str]) -> None:
    """Start or continue a run, and keep its result alone."""
    resume = ["--resume"] if (run / "checkpoints").exists() else []
    changes = [part for override in overrides for part in ("--set", override)]
    unmask(verb, "--recipe", f"recipes/{recipe}.yaml", "--out", run, *changes, *resume)
    shutil.rmtree(run / "checkpoints")


def make(variant: Variant) -> None:
    """Train or merge, unless it is done."""
    if (variant.run / "config.json").exists():
        return
    if variant.merge:
        unmask("merge", "--run", CAP_STAGE, "--top-k", variant.merge, "--out", variant.run)
        return
    if variant.scale is not None:
        difference = ("--plus", CONTROL, "--minus", "smollm2-135m", "--scale", variant.scale)
        unmask("merge", CAP_STAGE, *difference, "--out", variant.run)
        return
    train(variant.verb, variant.recipe, variant.run, variant.overrides)


def nelbo(model: Path) -> float:
    """Of the rows that the child's second stage held out, at its block size, in nats per token."""
    recipe = load_recipe(Path("recipes/reproduction_sft.yaml")).model_copy(update={"model": str(model)})
    components = build_components(recipe)
    assert components.validation is not None
    value: float = evaluate(components.objective, components.validation, recipe.blocks.phases[-1])["nelbo"]
    return value


def figures(variant: Variant, questions: int) -> dict[str, Any]:
    """Loss figures of the run and, for what decodes well enough, score and tokens per forward on validation."""
    found: dict[str, Any] = asdict(variant)
    if variant.scale is not None:
        found["nelbo"] = nelbo(variant.run)
    elif not variant.merge:
        records = read_metrics(variant.run / "metrics.jsonl")
        train = [record for record in records if record["kind"] == "train"]
        norms = [record["grad_norm"] for record in train]
        found |= {"tokens": train[-1]["tokens"], "seconds": sum(record["seconds"] for record in train)}
        loss = "draft_nll" if variant.group == "drafts" else "nelbo"
        found |= {loss: records[-1]["nelbo"], "grad_norm_max": max(norms), "loss_max": max(r["loss"] for r in train)}
        found |= {key: records[-1][key] for key in ("ar_nll", "accepted_length") if key in records[-1]}
        if variant.group == "drafts":
            found["accepted_of_3"] = records[-1]["accepted_of_3"]
    if variant.group not in ("convert", "drafts"):
        folder = ROOT / "scores" / variant.run.name
        size = 4 if variant.group in ("cap", "merge", "difference") else 8
        mode = ("--mode", "speculative") if variant.group == "joint" else ()
        unmask("eval", "--model", variant.run, "--suite", "mini-5", "--split", "validation", "--limit", questions,
               "--block-size", size, "--batch", 8, *mode, "--out", folder, "--resume")  # fmt: skip
        tasks = load_results(folder)["tasks"].values()
        speeds = [task["speed"] for task in tasks]
        found["score"] = statistics.fmean(task["score"] for task in tasks)
        found["tokens_per_forward"] = sum(s["tokens"] for s in speeds) / sum(s["forwards"] for s in speeds)
    return found


COLUMNS = {
    "nelbo": ("NELBO", 1, 3),
    "ar_nll": ("NLL, clean rows", 1, 3),
    "draft_nll": ("NLL of drafts", 1, 3),
    "accepted_length": ("drafts accepted", 1, 2),
    "accepted_of_3": ("of the first 3", 1, 2),
    "grad_norm_max": ("largest gradient norm", 1, 1),
    "score": ("score", 100, 1),
    "tokens_per_forward": ("tokens per forward", 1, 2),
    "seconds": ("minutes", 1 / 60, 0),
}


def table(group: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A group in Markdown."""
    columns = {key: column for key, column in COLUMNS.items() if any(key in row for row in found)}
    tokens = next((f", {row['tokens']:,} tokens each" for row in found if "tokens" in row), "")
    lines = [f"**{group}**{tokens}", "", "| | " + " | ".join(name for name, _, _ in columns.values()) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for row in found:
        cells = (f"{scale * row.get(key, math.nan):.{digits}f}" for key, (_, scale, digits) in columns.items())
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def plot(groups: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """One panel a group: NELBO where there is one, else drafts accepted or the score."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(groups), figsize=(4 * len(groups), 3.2), layout="constrained", squeeze=False)
    for axis, (group, rows) in zip(axes[0], groups.items(), strict=True):
        key = next(key for key in ("nelbo", "accepted_of_3", "score") if key in rows[0] and (key, group) != ("nelbo", "cap"))
        label, scale, _ = COLUMNS[key]
        axis.barh([row["name"] for row in rows], [scale * row[key] for row in rows], color="tab:blue")
        axis.invert_yaxis()
        axis.set(title=group, xlabel=f"{label} ({'lower' if key == 'nelbo' else 'higher'} is better)")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default="joint,drafts,convert,sft,cap,merge,difference")
    parser.add_argument("--questions", type=int, default=20, help="validation questions per task")
    parser.add_argument("--plot-only", action="store_true", help="from ablations.json as it is")
    options = parser.parse_args()
    path = ROOT / "ablations.json"
    known: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}
    ROOT.mkdir(parents=True, exist_ok=True)
    chosen = options.groups.split(",")
    if "convert" in chosen:
        documents()
    for variant in variants():
        if not options.plot_only and variant.group in chosen and variant.run.name not in known:
            make(variant)
            known[variant.run.name] = figures(variant, options.questions)
            path.write_text(json.dumps(known, indent=1) + "\n")
    groups: dict[str, list[dict[str, Any]]] = {}
    for variant in variants():
        if variant.run.name in known:
            groups.setdefault(variant.group, []).append(known[variant.run.name])
    lines = [line for group, rows in groups.items() for line in table(group, rows)]
    (ROOT / "ablations.md").write_text("\n".join(lines))
    plot(groups, ROOT / "ablations.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
