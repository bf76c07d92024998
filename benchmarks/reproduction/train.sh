#!/usr/bin/env bash
# Trains the reproduction's models: the gated child with its autoregressive control (PACK= scripts/embedded/gated.sh), and those that
# it is compared with: the one converted in full (PACK= scripts/embedded/make.sh), the same given what the control learned, and a
# shifted one. Interrupted, it goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=out/reproduction
source scripts/embedded/stage.sh

PACK='' scripts/embedded/gated.sh
PACK='' scripts/embedded/make.sh
if [[ ! -e $out/grafted/config.json ]]; then
    .venv/bin/unmask merge "$out/cap" --plus "$out/control_long" --minus smollm2-135m --out "$out/grafted"
fi
stage sft reproduction_graft "$out/graft"
stage convert reproduction_shift "$out/shift"
