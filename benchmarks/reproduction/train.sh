#!/usr/bin/env bash
# Trains the reproduction's models: the child (PACK= scripts/embedded/make.sh), its autoregressive control on the same examples, and
# the next child, which is given what the control learned. Interrupted, it goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=out/reproduction

# stage NAME: start or go on with a run of recipes/reproduction_NAME.yaml, unless it is finished.
stage() {
    local resume=()
    [[ -e "$out/$1/config.json" ]] && return
    [[ -e "$out/$1/checkpoints" ]] && resume=(--resume)
    .venv/bin/unmask sft --recipe "recipes/reproduction_$1.yaml" --out "$out/$1" "${resume[@]}"
}

PACK='' scripts/embedded/make.sh
stage control
stage control_long
if [[ ! -e $out/grafted/config.json ]]; then
    .venv/bin/unmask merge "$out/cap" --plus "$out/control_long" --minus smollm2-135m --out "$out/grafted"
fi
stage graft
stage settle
