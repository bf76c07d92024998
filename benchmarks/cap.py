"""What confidence-aware training (CAP) buys: score and tokens per forward over thresholds, with and without, at equal tokens.

    python benchmarks/cap.py [--tokens 24000] [--count 24] [--thresholds 0.5,0.7,0.85,0.95,0.99] [--weight 2] [--out
    out/bench-cap]

One supervised run on reasoning-gym problems prepares the model; from there one run goes on without CAP and one with it, on the
same problems under the same noise. Then both answer problems of a seed that neither was trained on. Runs resume, so the
script can be stopped and started again. Writes a table, a PNG and a JSON file to benchmarks/results/.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import reasoning_gym
from common import arguments, results_path, write_results
from floors import machine
from quality import FAMILIES, UNSEEN_SEED
from rich.console import Console
from rich.progress import track

import unmask
from unmask.cli.progress import showing_progress
from unmask.engine.llm import LanguageModel
from unmask.train.metrics import read_metrics
from unmask.train.recipe import Recipe, parse_recipe
from unmask.train.run import run_recipe


def recipe(model: str, tokens: int, *, weight: float, seed: int) -> Recipe:
    """Fine-tuning on the families; the CAP figures are logged in every run."""
    return parse_recipe(
        {
            "model": model,
            "data": {
                "row_length": 256,
                "overlong": "drop",
                "validation_rows": 8,
                "sources": [{"kind": "reasoning_gym", "families": FAMILIES}],
            },
            "objective": {"kind": "denoise", "bandwidth": [0.3, 1.0], "mask_noise_steps": 0, "cap": {"weight": weight}},
            "train": {
                "tokens": tokens, "batch_rows": 4, "micro_rows": 4, "learning_rate": 1e-4, "warmup_steps": 5,
                "eval_every": 10, "checkpoint_every": 10, "keep_checkpoints": 1, "seed": seed,
            },
        },
        "benchmarks/cap.py",
    )  # fmt: skip


def train(console: Console, out: Path, plan: Recipe) -> Path:
    """Carry a run out, or take up where it was."""
    if not (out / "config.json").exists():
        console.print(f"training {out}")
        with showing_progress(console, plan.train.tokens) as on_record:
            run_recipe(plan, out, resume=True, on_record=on_record)
    return out


def measure(model: LanguageModel, threshold: float, count: int, name: str) -> dict[str, Any]:
    """Score by family (share of exactly right answers), tokens per forward (all forwards counted) and tokens/s."""
    scores, tokens, forwards, seconds = {}, 0, 0, 0.0
    for family, settings in FAMILIES.items():
        problems = reasoning_gym.create_dataset(family, seed=UNSEEN_SEED, size=count, **settings)
        right = 0
        for problem in track(problems, description=f"{name}, threshold {threshold}, {family}", transient=True):
            answer = model.generate(problem["question"], max_new_tokens=32, threshold=threshold)
            right += problems.score_answer(answer.text.strip(), problem) == 1.0
            tokens, forwards = tokens + answer.completion_tokens, forwards + answer.forwards
            seconds += answer.seconds
        scores[family] = right / count
    mean = statistics.mean(scores.values())
    return {"score": mean, "scores": scores, "tokens_per_forward": tokens / forwards, "tokens_per_second": tokens / seconds}


def report(console: Console, results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """The table; ratios are CAP's over the plain run's at the same threshold."""
    console.print(f"{'threshold':<11}{'plain score':>12}{'per forward':>13}{'CAP score':>12}{'per forward':>13}{'ratio':>8}")
    for threshold in results["plain"]:
        plain, cap = results["plain"][threshold], results["cap"][threshold]
        ratio = cap["tokens_per_forward"] / plain["tokens_per_forward"]
        console.print(
            f"{threshold:<11}{plain['score']:>12.1%}{plain['tokens_per_forward']:>13.2f}"
            f"{cap['score']:>12.1%}{cap['tokens_per_forward']:>13.2f}{ratio:>8.2f}"
        )


def draw(results: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), constrained_layout=True)
    for (name, rows), marker in zip(results.items(), "os", strict=True):
        points = [(row["tokens_per_forward"], 100 * row["score"]) for row in rows.values()]
        axes.plot(*zip(*points, strict=True), f"{marker}-", label={"plain": "SFT", "cap": "SFT + CAP"}[name])
        for (x, y), threshold in zip(points, rows, strict=True):
            axes.annotate(threshold, (x, y), textcoords="offset points", xytext=(4, 4), fontsize="small")
    axes.set_xlabel("tokens per forward (every forward counted)")
    axes.set_ylabel("problems solved, %")
    axes.set_title("numbers: decoding threshold")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m-converted")
    parser.add_argument("--tokens", type=int, default=24_000, help="of each of the three runs")
    parser.add_argument("--weight", type=float, default=2.0, help="of the CAP term; the report's is 2")
    parser.add_argument("--count", type=int, default=24, help="test problems of each family")
    parser.add_argument("--thresholds", default="0.5,0.7,0.85,0.95,0.99")
    parser.add_argument("--out", type=Path, default=Path("out/bench-cap"))
    options = parser.parse_args(argv)
    if options.smoke:
        options.tokens, options.count, options.thresholds = 600, 1, "0.9"
    console = Console()
    ready = train(console, options.out / "ready", recipe(options.model, options.tokens, weight=0.0, seed=0))
    runs = {
        "plain": train(console, options.out / "plain", recipe(str(ready), options.tokens, weight=0.0, seed=1)),
        "cap": train(console, options.out / "cap", recipe(str(ready), options.tokens, weight=options.weight, seed=1)),
    }
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name, folder in runs.items():
        model = unmask.load(folder, quantize="none")
        results[name] = {t: measure(model, float(t), options.count, name) for t in options.thresholds.split(",")}
    last = {
        name: [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "validation"][-1] for name, run in runs.items()
    }
    report(console, results)
    for name, record in last.items():
        console.print(f"validation NELBO, {name}: {record['nelbo']:.3f} nats per token")
    path = results_path(options.results, "cap")
    settings = {key: str(value) for key, value in vars(options).items()}
    draw(results, path.with_suffix(".png"))
    written = {"machine": machine(), "options": settings, "results": results, "validation": last}
    write_results(path, written)
    console.print(f"written to {path} and .png")


if __name__ == "__main__":
    main()
