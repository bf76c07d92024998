#!/usr/bin/env bash
# Drafts for the unmodified smollm2-135m from its own text: free texts of Debian packages, what the model says to prompts and makes
# of those texts, the n-grams of that, which come with the package, and a gated LoRA that drafts it (recipes/drafts_own.yaml). For
# one GPU: DEVICE=cuda, some minutes; on two CPU cores it takes days. TOKENS of own text [3,000,000]. Interrupted, it goes on
# where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=out/drafts
source scripts/embedded/stage.sh

if [[ ! -e $out/free_texts/texts.jsonl ]]; then
    .venv/bin/python scripts/embedded/free_texts.py --out "$out/free_texts"
fi
.venv/bin/python scripts/embedded/own_text.py --out "$out/text" --texts "$out/free_texts/texts.jsonl" --jobs "$out/jobs.jsonl" \
    --answers 3 --tokens "${TOKENS:-3000000}" --device "${DEVICE:-cpu}"
.venv/bin/unmask ngrams smollm2-135m --data "$out/text/train" --out src/unmask/assets/smollm2-135m
stage convert drafts_own "$out/gated"
