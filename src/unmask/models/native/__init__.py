"""CPU inference of dense transformers with 8- or 4-bit weights: C++ kernels, compiled at installation, and their interface."""
