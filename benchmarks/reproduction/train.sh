#!/usr/bin/env bash
# Trains the reproduction's models: the child (PACK= scripts/embedded/make.sh), its autoregressive control on the same examples, and
# the next child, which is given what the control learned. Interrupted, it goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=out/reproduction
source scripts/embedded/stage.sh

PACK='' scripts/embedded/make.sh
stage sft reproduction_control "$out/control"
stage sft reproduction_control_long "$out/control_long"
if [[ ! -e $out/grafted/config.json ]]; then
    .venv/bin/unmask merge "$out/cap" --plus "$out/control_long" --minus smollm2-135m --out "$out/grafted"
fi
stage sft reproduction_graft "$out/graft"
stage sft reproduction_settle "$out/settle"
