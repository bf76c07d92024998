#!/usr/bin/env bash
# The reproduction's gated child: the autoregressive model fine-tuned on its examples (the control), then a gated LoRA that drafts
# for it; about four hours on two CPU cores. Interrupted, it goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=out/reproduction
source scripts/embedded/stage.sh

examples
stage sft reproduction_control "$out/control"
stage sft reproduction_control_long "$out/control_long"
stage convert reproduction_drafts "$out/drafts"
stage convert reproduction_drafts_long "$out/drafts_long"
if [[ ! -e $out/data/own.jsonl ]]; then
    .venv/bin/python benchmarks/reproduction/data.py --count 12000 --own "$out/control_long"
fi
stage convert reproduction_drafts_own "$out/drafts_own"
