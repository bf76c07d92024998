#!/usr/bin/env bash
# Trains the reproduction's models: the one checkpoint of three modes and its control (PACK= scripts/embedded/joint.sh), and those that
# they are compared with: the gated child of a fine-tuned control (scripts/embedded/gated.sh), the one converted without causal rows
# (PACK= scripts/embedded/make.sh), the same given what the control learned, and a shifted one. Interrupted, it goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=out/reproduction
source scripts/embedded/stage.sh

PACK='' scripts/embedded/joint.sh
scripts/embedded/gated.sh
PACK='' scripts/embedded/make.sh
if [[ ! -e $out/grafted/config.json ]]; then
    .venv/bin/unmask merge "$out/cap" --plus "$out/control_long" --minus smollm2-135m --out "$out/grafted"
fi
stage sft reproduction_graft "$out/graft"
stage convert reproduction_shift "$out/shift"
