"""Endpoints that generate text: one file per API, each a thin layer that translates bodies and writes responses."""
