#!/usr/bin/env bash
# Trains the reproduction's models: the child (PACK= scripts/embedded/make.sh), its autoregressive control on the same examples, a
# child that is given what the control learned, and the shifted one. Interrupted, it goes on where it was.
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
stage convert reproduction_shift "$out/shift"
