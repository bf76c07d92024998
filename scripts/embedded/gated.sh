#!/usr/bin/env bash
# Makes smollm2-135m-diffusion again: the autoregressive model fine-tuned on the reproduction's examples, then a gated LoRA that drafts
# for it; about four hours on two CPU cores. Interrupted, it goes on where it was. PACK= leaves the shipped files alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=out/reproduction
source scripts/embedded/stage.sh

if [[ ! -e $out/data/mini5.jsonl ]]; then
    .venv/bin/python benchmarks/reproduction/data.py --count 12000
fi
stage sft reproduction_control "$out/control"
stage sft reproduction_control_long "$out/control_long"
stage convert reproduction_drafts "$out/drafts"
stage convert reproduction_drafts_long "$out/drafts_long"
if [[ ! -e $out/data/own.jsonl ]]; then
    .venv/bin/python benchmarks/reproduction/data.py --count 12000 --own "$out/control_long"
fi
stage convert reproduction_drafts_own "$out/drafts_own"
if [[ -n "${PACK-1}" ]]; then
    .venv/bin/python scripts/embedded/package.py --runs "$out"/{control,control_long,drafts,drafts_long,drafts_own} \
        --asset src/unmask/assets/smollm2-135m-diffusion
fi
