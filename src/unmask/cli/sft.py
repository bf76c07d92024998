"""`unmask sft`: supervised fine-tuning of a diffusion model.

Owns the help text. Options, recipe and output are `cli.training`'s.
"""

from __future__ import annotations

from unmask.cli.training import training_verb

sft = training_verb(
    "sft",
    """Fine-tune a diffusion model on conversations: only what the assistant writes is learnt.

\b
unmask sft --model out/mine --data chats.jsonl --out out/chat
unmask sft --data reasoning_gym:chain_sum --out out/sums --set objective.cap.weight=2
unmask sft --data chats.jsonl --out out/lora --set train.lora.rank=16
unmask sft --out out/chat --resume

A record holds "messages" (OpenAI), "conversations" (ShareGPT), or "prompt" and "response"; "tools" go to the chat template.
objective.cap adds confidence-aware training (CAP): more tokens per forward, at some cost in quality.
""",
)
