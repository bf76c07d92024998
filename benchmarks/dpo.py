"""What noise samples buy in DPO over the ELBO: preference accuracy and margin over steps with 1 and with 8, and the variance.

    python benchmarks/dpo.py [--tokens 3000] [--samples 1,8] [--answers scripts/embedded/answers.jsonl] [--out out/bench-dpo]

The pairs need no judge: an answer of the base model is preferred to the same answer with a word doubled and one dropped, the
faults of a young diffusion model. All runs see the same pairs in the same order. Variance: of the mean margin of the same
held-out pairs, over fresh noise. Runs resume. Writes a table, a PNG and a JSON file to benchmarks/results/.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import arguments, results_path, write_results
from floors import machine
from rich.console import Console

from unmask.cli.progress import showing_progress
from unmask.train.loop import evaluate
from unmask.train.metrics import MetricRecord, read_metrics
from unmask.train.objectives.preference import PreferenceSection
from unmask.train.recipe import Recipe, parse_recipe
from unmask.train.run import build_components, run_recipe


def spoil(answer: str, rng: random.Random) -> str:
    """The answer with a word doubled and a word dropped somewhere."""
    words = answer.split()
    at = rng.randrange(len(words))
    words.insert(at, words[at])
    del words[rng.randrange(len(words))]
    return " ".join(words)


def write_pairs(answers: Path, path: Path, count: int) -> None:
    """Short answers of the base model, each with a spoilt copy; a spoilt copy that came out the same is tried again."""
    rng = random.Random(0)
    lines = []
    for line in answers.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if not 4 <= len(record["response"].split()) <= 30:
            continue
        chosen = " ".join(record["response"].split())
        rejected = chosen
        while rejected == chosen:
            rejected = spoil(chosen, rng)
        lines.append(json.dumps({"prompt": record["prompt"], "chosen": chosen, "rejected": rejected}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")


def recipe(model: str, pairs: Path, tokens: int, samples: int) -> Recipe:
    return parse_recipe(
        {
            "model": model,
            "data": {
                "row_length": 128, "overlong": "drop", "validation_share": 0.1, "validation_rows": 8,
                "sources": [{"kind": "jsonl", "path": str(pairs)}],
            },
            "objective": {"kind": "preference", "mask_samples": samples},
            "train": {
                "tokens": tokens, "batch_rows": 4, "micro_rows": 2, "learning_rate": 2e-5, "schedule": "constant",
                "warmup_steps": 3, "eval_every": 3, "checkpoint_every": 20, "keep_checkpoints": 1,
            },
        },
        "benchmarks/dpo.py",
    )  # fmt: skip


def noise_variance(trained: Path, plan: Recipe, seeds: int) -> float:
    """Variance over fresh noise of the mean held-out margin (in nats, not times beta), policy `trained` against the start."""
    components = build_components(plan)
    assert components.validation is not None
    assert isinstance(plan.objective, PreferenceSection)
    policy = build_components(plan.model_copy(update={"model": str(trained)})).model
    components.model.load_state_dict(policy.state_dict())
    estimates = []
    for epoch in range(seeds):
        rows = replace(components.validation, epoch_RL=components.validation.epoch_RL + 1_000 + epoch)
        margin = evaluate(components.objective, rows, plan.blocks.phases[0])["reward_margin"]
        estimates.append(margin / plan.objective.beta)
    return float(torch.tensor(estimates).var())


def draw(curves: dict[int, list[MetricRecord]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(6, 5), constrained_layout=True)
    for samples, records in curves.items():
        steps = [record["step"] for record in records]
        top.plot(steps, [record["reward_accuracy"] for record in records], "o-", label=f"n = {samples}")
        bottom.plot(steps, [record["reward_margin"] for record in records], "o-")
    top.set_ylabel("held-out accuracy")
    top.legend()
    bottom.set_ylabel("held-out margin")
    bottom.set_xlabel("step")
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m-converted")
    parser.add_argument("--answers", type=Path, default=Path("scripts/embedded/answers.jsonl"))
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=3_000)
    parser.add_argument("--samples", default="1,8")
    parser.add_argument("--noise-seeds", type=int, default=4, help="fresh draws for the variance")
    parser.add_argument("--out", type=Path, default=Path("out/bench-dpo"))
    options = parser.parse_args(argv)
    if options.smoke:
        options.tokens, options.pairs, options.noise_seeds, options.samples = 600, 40, 2, "1,2"
    console = Console()
    pairs = options.out / "pairs.jsonl"
    write_pairs(options.answers, pairs, options.pairs)
    curves: dict[int, list[MetricRecord]] = {}
    summary: dict[int, dict[str, Any]] = {}
    for samples in map(int, options.samples.split(",")):
        plan, out = recipe(options.model, pairs, options.tokens, samples), options.out / f"n{samples}"
        if not (out / "config.json").exists():
            console.print(f"training with {samples} noise samples")
            with showing_progress(console, plan.train.tokens) as on_record:
                run_recipe(plan, out, resume=True, on_record=on_record)
        records = read_metrics(out / "metrics.jsonl")
        curves[samples] = [record for record in records if record["kind"] == "validation"]
        train = [record for record in records if record["kind"] == "train"]
        summary[samples] = {
            "steps": train[-1]["step"],
            "seconds_per_step": sum(record["seconds"] for record in train) / len(train),
            "held_out_accuracy": curves[samples][-1]["reward_accuracy"],
            "held_out_margin": curves[samples][-1]["reward_margin"],
            "held_out_loss": curves[samples][-1]["preference_loss"],
            "variance_of_mean_margin": noise_variance(out, plan, options.noise_seeds),
        }
    console.print(
        f"{'samples':<9}{'steps':>7}{'s/step':>8}{'accuracy':>10}{'margin':>9}{'loss':>8}{'noise variance, nats^2':>25}"
    )
    for samples, row in summary.items():
        console.print(
            f"{samples:<9}{row['steps']:>7}{row['seconds_per_step']:>8.1f}{row['held_out_accuracy']:>10.1%}{row['held_out_margin']:>9.3f}"
            f"{row['held_out_loss']:>8.3f}{row['variance_of_mean_margin']:>25.4g}"
        )
    path = results_path(options.results, "dpo")
    draw(curves, path.with_suffix(".png"))
    settings = {key: str(value) for key, value in vars(options).items()}
    written = {"machine": machine(), "options": settings, "summary": summary, "curves": curves}
    write_results(path, written)
    console.print(f"written to {path} and .png")


if __name__ == "__main__":
    main()
