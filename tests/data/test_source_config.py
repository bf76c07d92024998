"""Sources as a recipe names them: wrong keys and values are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from helpers import refused
from unmask.data.sources import SourceConfig, open_source
from unmask.data.tokenizer import Tokenizer
from unmask.errors import ConfigError


@pytest.mark.parametrize(
    ("families", "names"),
    [
        ({"chain_summ": {}}, ("chain_summ", "chain_sum")),
        ({"chain_sum": {"terms": 3}}, ("chain_sum",)),
        ({"chain_sum": {"min_terms": 5, "max_terms": 2}}, ("chain_sum",)),
        ({"chain_sum": {"seed": 3}}, ("seed", "chain_sum")),
    ],
)
def test_bad_families(tokenizer: Tokenizer, families: dict[str, Any], names: tuple[str, ...]) -> None:
    with refused(ConfigError, *names):
        open_source(SourceConfig(kind="reasoning_gym", families=families), tokenizer, 0)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"kind": "csv", "path": "x"}, "kind"),
        ({"kind": "jsonl"}, "path"),
        ({"kind": "jsonl", "path": "x", "split": "test"}, "split"),
        ({"kind": "text", "path": "x", "chat": False}, "chat"),
        ({"kind": "jsonl", "path": "x", "unknown": 1}, "unknown"),
        ({"kind": "jsonl", "path": "x", "weight": 0}, "weight"),
        ({"kind": "jsonl", "path": "x", "weight": float("inf")}, "weight"),
        ({"kind": "jsonl", "path": "x", "eos_fill": 0}, "eos_fill"),
        ({"kind": "jsonl", "path": "x", "supervise": "none"}, "supervise"),
        ({"kind": "huggingface"}, "id and path"),
        ({"kind": "huggingface", "id": "a/b", "path": "x"}, "id and path"),
        ({"kind": "reasoning_gym"}, "families"),
        ({"kind": "reasoning_gym", "families": {}}, "families"),
        ({"kind": "reasoning_gym", "families": {"chain_sum": {}}, "path": "x"}, "path"),
    ],
)
def test_bad_configs(config: dict[str, Any], name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        SourceConfig(**config)


def test_config_survives_serialising() -> None:
    """What is written into a checkpoint's recipe can be read again."""
    families = {"chain_sum": {"max_terms": 3}, "leg_counting": {}}
    problems = SourceConfig(kind="reasoning_gym", families=families, items_per_epoch=11)
    for config in (SourceConfig(kind="jsonl", path="x", eos_fill=32), problems):
        assert SourceConfig.model_validate(json.loads(config.model_dump_json())) == config
