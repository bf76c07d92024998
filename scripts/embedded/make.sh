#!/usr/bin/env bash
# Makes the embedded diffusion model again, from the autoregressive one: about three hours on one CPU core.
# Interrupted, it goes on where it was. SAMPLE=1 first lets the model answer the prompts anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# convert RECIPE RUN: start or continue a run, unless it is finished.
convert() {
    local resume=()
    [[ -e "$2/config.json" ]] && return
    [[ -e "$2/checkpoints" ]] && resume=(--resume)
    .venv/bin/unmask convert --recipe "$1" --out "$2" "${resume[@]}"
}

if [[ -n "${SAMPLE:-}" ]]; then
    .venv/bin/python scripts/embedded/sample_answers.py --out scripts/embedded/answers.jsonl
fi
convert recipes/smollm2-135m_convert_cpu.yaml out/embedded
convert recipes/smollm2-135m_continue_cpu.yaml out/embedded-2
.venv/bin/python scripts/embedded/package.py --runs out/embedded out/embedded-2
