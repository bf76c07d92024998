"""`unmask compare`: two models on the same items, such as an autoregressive parent and its diffusion child.

Owns the options and the table. Statistics and reports are `unmask.eval`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli import decoding as options
from unmask.cli import evaluation
from unmask.cli.console import make_console
from unmask.cli.tables import print_table
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import ConfigError


@options.with_sampling_options("Sampling", "Diffusion", "Speculative")
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A model, or the folder of a run of unmask eval.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The model or run to compare with it.")],
    params: SamplingParams,
    suite: evaluation.SuiteName = None,
    tasks: evaluation.TaskNames = None,
    limit: evaluation.Limit = None,
    split: evaluation.SplitName = "test",
    out: Annotated[Path, typer.Option(help="Folder of the report, and of the runs of models.")] = Path("out/compare"),
    batch: evaluation.Batch = 1,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = "auto",
) -> None:
    """Compare two models item by item: scores, confidence intervals of the differences, and speed.

    \b
    unmask compare smollm2-135m smollm2-135m-diffusion --suite mini-5
    unmask compare out/eval/before out/eval/after --out out/report

    Answers that a folder under --out already holds are reused. The report is written there as Markdown, HTML and JSON.
    """
    from unmask.eval.compare import compare_samples
    from unmask.eval.report import comparison_row, write_comparison
    from unmask.eval.runner import EvalSettings, load_results, load_samples

    console = make_console()
    settings = EvalSettings(split, params, batch)
    are_runs = [(Path(name) / "samples.jsonl").exists() for name in (a, b)]
    folders = [Path(a) if are_runs[0] else out / "a", Path(b) if are_runs[1] else out / "b"]
    evaluation.check_models(*(name for name, is_run in zip((a, b), are_runs, strict=True) if not is_run))
    if not all(are_runs):
        selection = evaluation.select_tasks(suite, tasks)
        if selection.harness:
            raise ConfigError(f"{selection.harness[0]} is a task of lm-eval, whose items are not paired; compare our own tasks")
        for name, is_run, folder in zip((a, b), are_runs, folders, strict=True):
            if not is_run:
                model = evaluation.open_model(name, dtype=dtype, device=device, quantize=quantize)
                evaluation.answer(console, model, selection.own, folder, limit, settings)
    comparisons = compare_samples(*(load_samples(folder) for folder in folders))
    files = write_comparison(out, comparisons, *(load_results(folder) for folder in folders))
    rows = [comparison_row(task, each) for task, each in comparisons.items()]
    print_table(console, list(rows[0]), [list(row.values()) for row in rows], title=f"A is {a}, B is {b}")
    console.print(f"report   {files['report.md']}, {files['report.html']}", soft_wrap=True)
