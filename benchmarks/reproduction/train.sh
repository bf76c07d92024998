#!/usr/bin/env bash
# Trains the reproduction's models: the child (PACK= scripts/embedded/make.sh) and its autoregressive control, on the same examples.
# Interrupted, it goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# control RECIPE: start or go on with a run of the control, unless it is finished.
control() {
    local resume=() run="out/reproduction/$1"
    [[ -e "$run/config.json" ]] && return
    [[ -e "$run/checkpoints" ]] && resume=(--resume)
    .venv/bin/unmask sft --recipe "recipes/reproduction_$1.yaml" --out "$run" "${resume[@]}"
}

PACK='' scripts/embedded/make.sh
control control
control control_long
