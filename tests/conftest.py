"""Hypothesis for every test: the same examples each time, and no deadline, which a busy machine would miss."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("unmask", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("unmask")
