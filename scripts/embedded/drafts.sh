#!/usr/bin/env bash
# Makes smollm2-135m-diffusion again: drafts for the unmodified smollm2-135m from its own text. Free texts of Debian packages, what the
# model says to prompts and makes of those texts (TOKENS of it [700,000]), the n-grams of that (the package holds those of 4,700,000
# tokens, counted in two parts by `unmask ngrams --extend`), and a gated LoRA that drafts it: two hours and a half on two CPU cores with
# AMX, DEVICE=cuda for one GPU. Interrupted, it goes on where it was. PACK= leaves the shipped files alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=out/drafts
source scripts/embedded/stage.sh

own_text() {
    .venv/bin/python scripts/embedded/own_text.py --out "$out/text" --texts "$out/free_texts/texts.jsonl" --jobs "$out/jobs.jsonl" \
        --continuations 0.25 --tokens "$1" --device "${DEVICE:-cpu}" --threads 2 --max-num-seqs "${SEQS:-128}"
}

if [[ ! -e $out/free_texts/texts.jsonl ]]; then
    .venv/bin/python scripts/embedded/free_texts.py --out "$out/free_texts"
fi
own_text 370000
stage convert drafts_own "$out/first"
own_text "${TOKENS:-700000}"
.venv/bin/unmask ngrams smollm2-135m --data "$out/text/train" --out "$out/ngrams"
if [[ ! -e $out/mini5/own.jsonl ]]; then
    .venv/bin/python benchmarks/reproduction/data.py --count 12000 --own smollm2-135m --own-count 1500 --out "$out/mini5"
fi
stage convert drafts_own_long "$out/gated"
if [[ -n "${PACK-1}" ]]; then
    .venv/bin/python scripts/embedded/package.py --kind drafts --runs "$out"/{first,gated} \
        --asset src/unmask/assets/smollm2-135m-diffusion
fi
