"""Weights on disk: safetensors, hub, adapters, GGUF, deltas, checkpoints and export."""
