#!/usr/bin/env bash
# Makes smollm2-135m-joint again, all weights of the parent trained for three ways of decoding, and the autoregressive control of as many
# tokens: an hour and half an hour on one core with AMX. Interrupted, it goes on where it was. PACK= leaves the shipped files alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=out/reproduction
source scripts/embedded/stage.sh

examples
stage convert reproduction_joint "$out/joint"
stage sft reproduction_joint_control "$out/joint_control"
if [[ -n "${PACK-1}" ]]; then
    .venv/bin/python scripts/embedded/package.py --kind joint --runs "$out/joint" \
        --asset src/unmask/assets/smollm2-135m-joint --max-bytes 35000000
fi
