"""Sequences being decoded: speculative (autoregressive among them), block diffusion, constrained, scoring."""
