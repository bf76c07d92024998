"""GGUF, the files of llama.cpp: tensor names, config and tokenizer in both directions, and reading. Dense models only."""
