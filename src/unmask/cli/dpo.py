"""`unmask dpo`: preference optimisation of a diffusion model.

Owns the help text. Options, recipe and output are `cli.training`'s.
"""

from __future__ import annotations

from unmask.cli.training import training_verb

dpo = training_verb(
    "dpo",
    """Make a diffusion model prefer one answer over another (DPO over the ELBO).

\b
unmask dpo --model out/chat --data preferences.jsonl --out out/aligned
unmask dpo --data preferences.jsonl --out out/lora --set train.lora='{rank: 16, train_embedding: false}'
unmask dpo --out out/aligned --resume

A record holds "chosen" and "rejected", with or without "prompt": texts or lists of messages. The reference is a frozen copy
of the model, or, with LoRA, the model without its adapter.
""",
)
