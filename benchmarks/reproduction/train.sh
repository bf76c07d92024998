#!/usr/bin/env bash
# Trains the reproduction's models from the embedded ones: child (SFT, then CAP) and autoregressive control, on the same examples.
# Interrupted, it goes on where it was. GSM8K=train.jsonl adds GSM8K to the data. THREADS (default: all) pins PyTorch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ -n "${THREADS:-}" ]] && export OMP_NUM_THREADS="$THREADS"

# stage NAME VERB: start or go on with a recipe's run, unless it is finished.
stage() {
    local resume=() run="out/reproduction/$1"
    [[ -e "$run/config.json" ]] && return
    [[ -e "$run/checkpoints" ]] && resume=(--resume)
    .venv/bin/unmask "$2" --recipe "recipes/reproduction_$1.yaml" --out "$run" "${resume[@]}"
}

if [[ ! -e out/reproduction/data/mini5.jsonl ]]; then
    .venv/bin/python benchmarks/reproduction/data.py --count 12000 ${GSM8K:+--gsm8k "$GSM8K"}
fi
stage child convert
stage cap sft
stage control sft
