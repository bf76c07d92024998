"""Sequences being decoded: autoregressive, block diffusion, constrained, speculative."""
