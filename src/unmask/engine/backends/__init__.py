"""Backends that compute the model: PyTorch, and the native CPU kernels."""
