"""Property tests are the same on every run, and a loaded machine fails none of them."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("diffusion", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("diffusion")
