"""`unmask convert`: train a block-diffusion model from an autoregressive one.

Owns the help text. Options, recipe and output are `cli.training`'s.
"""

from __future__ import annotations

from unmask.cli.training import training_verb

convert = training_verb(
    "convert",
    """Convert an autoregressive model to block diffusion.

\b
unmask convert --model smollm2-135m --data answers.jsonl --out out/mine
unmask convert --data reasoning_gym:chain_sum --out out/sums --set train.tokens=20000
unmask convert --recipe recipes/smollm2-135m_convert_cpu.yaml --out out/cpu
unmask convert --out out/mine --resume

A jsonl or parquet record holds "text", "messages", or "prompt" and "response". Ctrl-C saves a checkpoint and stops.
""",
)
