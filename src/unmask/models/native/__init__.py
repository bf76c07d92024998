"""Inference of dense transformers on a CPU with 8- or 4-bit weights: C++ kernels, compiled on demand, and what drives them."""
