"""Short runs of several seeds: the joint conversion and an unshifted one, each against the control of its seed and tokens.

    python benchmarks/reproduction/seeds.py [--tokens 100000] [--seeds 0,1,2] [--variants control,joint,unshifted,aligned]

Trains what is not there yet under out/reproduction/seeds (interrupted, it goes on), answers mini-5's test questions, and prints
a table, also into seeds.md there: scores by seed, and the difference from the control over all seeds' questions, in pairs.
Mode `ar` of a joint model writes what mode `speculative` does, which is evaluated. Makes the data (data.py) if it is not there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ablations
from report import BENCHMARKS, SUITE, run, unmask

from unmask.eval.compare import compare_samples
from unmask.eval.runner import EvalSample, load_results, load_samples
from unmask.files import atomic_write_json

ROOT = Path("out/reproduction/seeds")


@dataclass(frozen=True)
class Variant:
    """A recipe, what of it is different, and the modes that its model is evaluated in."""

    name: str
    verb: str
    recipe: str
    modes: tuple[str, ...]
    overrides: tuple[str, ...] = ()


VARIANTS = (
    Variant("control", "sft", "reproduction_joint_control", ("ar",)),
    Variant("joint", "convert", "reproduction_joint", ("speculative", "diffusion")),
    Variant("unshifted", "convert", "reproduction_unshifted", ("diffusion",), ("objective.align=0",)),
    Variant("aligned", "convert", "reproduction_unshifted", ("diffusion",)),
)
DIFFUSION = ("--block-size", 8, "--threshold", 0.9)


def train(variant: Variant, seed: int, tokens: int) -> Path:
    """The model of a seed, unless it is there."""
    model = ROOT / f"{variant.name}-{tokens}-{seed}"
    if not (model / "config.json").exists():
        overrides = (*variant.overrides, f"train.tokens={tokens}", f"train.seed={seed}", "train.eval_every=100000")
        ablations.train(variant.verb, variant.recipe, model, overrides)
    return model


def evaluated(model: Path, mode: str, questions: int) -> Path:
    """The folder of a model's answers in a mode."""
    folder = ROOT / "scores" / f"{model.name}-{mode}"
    flags = DIFFUSION if mode == "diffusion" else ()
    asked = ("--suite", SUITE, "--limit", questions, "--batch", 8)
    unmask("eval", "-m", model, *asked, "--mode", mode, *flags, "--out", folder, "--resume")
    return folder


def pooled(folders: Mapping[int, Path]) -> list[EvalSample]:
    """All seeds' answers, told apart by the seed."""
    return [replace(each, id=f"{seed}:{each.id}") for seed, folder in folders.items() for each in load_samples(folder)]


def rows(folders: Mapping[tuple[str, str], Mapping[int, Path]]) -> Iterator[dict[str, Any]]:
    """A row for each variant and mode: scores and tokens per forward by seed, and the difference from the control."""
    for (name, mode), by_seed in folders.items():
        results = {seed: load_results(folder) for seed, folder in by_seed.items()}
        scores = {
            seed: statistics.fmean(task["score"] for task in result["tasks"].values()) for seed, result in results.items()
        }
        speeds = [task["speed"] for result in results.values() for task in result["tasks"].values()]
        row: dict[str, Any] = {"variant": name, "mode": mode, "scores": scores}
        row["tokens_per_forward"] = sum(s["tokens"] for s in speeds) / sum(s["forwards"] for s in speeds)
        control = {seed: folder for seed, folder in folders.get(("control", "ar"), {}).items() if seed in by_seed}
        if name != "control" and control:
            shared = {seed: by_seed[seed] for seed in control}
            row["against_control"] = vars(compare_samples(pooled(control), pooled(shared))["all"].difference)
        yield row


def table(found: Sequence[Mapping[str, Any]], tokens: int) -> list[str]:
    """The rows in Markdown."""
    lines = [f"{tokens:,} tokens each.", "", "| | mode | score by seed | mean | difference (95%) | tokens per forward |"]
    lines.append("|---|---|---|---|---|---|")
    for row in found:
        scores = [100 * score for score in row["scores"].values()]
        by_seed = ", ".join(f"{score:.1f}" for score in scores)
        difference = row.get("against_control")
        told = "" if difference is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(
            *(100 * difference[key] for key in ("value", "low", "high"))
        )  # fmt: skip
        lines.append(
            f"| {row['variant']} | {row['mode']} | {by_seed} | {statistics.fmean(scores):.1f} | {told} "
            f"| {row['tokens_per_forward']:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="of each run")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", default=",".join(variant.name for variant in VARIANTS))
    parser.add_argument("--test", type=int, default=60, help="test questions per task")
    options = parser.parse_args()
    names = options.variants.split(",")
    if not (ablations.DATA / "mini5.jsonl").exists():
        run(sys.executable, BENCHMARKS / "reproduction" / "data.py", "--out", ablations.DATA, "--count", 12_000)
    folders: dict[tuple[str, str], dict[int, Path]] = {}
    for seed in map(int, options.seeds.split(",")):
        for variant in VARIANTS:
            if variant.name in names:
                model = train(variant, seed, options.tokens)
                for mode in variant.modes:
                    folders.setdefault((variant.name, mode), {})[seed] = evaluated(model, mode, options.test)
    found = list(rows(folders))
    atomic_write_json(ROOT / "seeds.json", {"tokens": options.tokens, "rows": found})
    lines = table(found, options.tokens)
    (ROOT / "seeds.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
