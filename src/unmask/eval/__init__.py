"""Quality and speed: benchmarks with scores, tokens per forward and tokens per second side by side."""
