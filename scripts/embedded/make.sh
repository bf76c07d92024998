#!/usr/bin/env bash
# Makes smollm2-135m-converted again, from the autoregressive model: about six hours on two CPU cores.
# Interrupted, it goes on where it was. PACK= leaves the shipped files alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

source scripts/embedded/stage.sh

examples
stage convert smollm2-135m_convert_cpu out/embedded
stage convert smollm2-135m_continue_cpu out/embedded-2
stage convert reproduction_child out/reproduction/child
stage sft reproduction_sft out/reproduction/sft
stage sft reproduction_cap out/reproduction/cap
if [[ -n "${PACK-1}" ]]; then
    runs=(out/embedded out/embedded-2 out/reproduction/{child,sft,cap})
    .venv/bin/python scripts/embedded/package.py --kind converted --runs "${runs[@]}" \
        --asset src/unmask/assets/smollm2-135m-converted
fi
