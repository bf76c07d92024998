"""Record the golden trajectories anew: `PYTHONPATH=tests python tests/conformance/record.py [KIND ...]`.

They come from the oracle (`engine/reference.py`) in float64. A case is kept only if float32 decides every step alike, so that
none hangs on rounding.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from conformance.adapter import as_json, trajectory
from conformance.models import KINDS, checksum, golden_model
from tiny import MASK, with_params
from unmask.engine.reference import generate_reference
from unmask.engine.request import Completion, DecodingStep, Request
from unmask.engine.sampling_params import PRESETS, ResolvedParams

GOLDEN = Path(__file__).parent / "golden"
PROMPT = (5, 17, 3, 40, 8, 22, 9, 31, 2, 50, 44, 13, 28)


def prompt(length: int, max_new_tokens: int, **rules: Any) -> Request:
    return Request(PROMPT[:length], ResolvedParams(**{"block_size": 8, "steps": 8, **rules}, max_new_tokens=max_new_tokens))


def cases(family: str) -> Iterator[tuple[str, Request]]:
    """Name and request; ends and biases are taken from what the model generates without them."""
    yield "threshold 0.9", prompt(5, 13, threshold=0.9)
    yield "threshold 0.3, a prompt of one token", prompt(1, 9, threshold=0.3, block_size=4, steps=4)
    yield "threshold 0, a prompt of whole blocks", prompt(8, 8, threshold=0.0, block_size=4)
    yield "threshold 1, three steps", prompt(6, 10, threshold=1.0, steps=3)
    yield "blocks of one token", prompt(3, 6, block_size=1, steps=1)
    yield "fixed schedule", prompt(5, 11, policy="fixed", steps=5)
    yield "entropy bound", prompt(5, 11, policy="entropy", entropy_bound=0.5)
    sampled = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "threshold": 0.5}
    yield "sampled, seed 3", prompt(5, 11, **sampled, seed=3)
    yield "sampled, seed 4, second sample", replace(prompt(5, 11, **sampled, seed=4), sample=1)
    yield "speed preset", prompt(5, 11, **PRESETS["speed"])
    yield "quality preset", prompt(5, 11, **PRESETS["quality"])
    edited = {"threshold": 0.4, "edit_threshold": 0.2, "max_post_steps": 3, "block_size": 4, "steps": 4}
    yield "editing in a window of 2 blocks", prompt(6, 10, **edited, window=2)
    holes = (5, None, None, 40, 8, 22, 9, 31, 2, 50, None, 13, None)
    yield "holes", replace(prompt(13, 0, threshold=0.5), ids=holes)
    yield "holes and new tokens, edited", replace(prompt(13, 3, **edited), ids=holes)
    plain = prompt(5, 13, threshold=0.5)
    generated = run(family, plain)[0].ids
    yield "an end inside", replace(plain, eos_ids=frozenset([late_token(generated)]))
    yield "no end before 9 new tokens", replace(with_params(plain, min_new_tokens=9), eos_ids=frozenset(generated[:7]))
    revised = prompt(5, 13, **edited)
    yield "an end in an edited block", replace(revised, eos_ids=frozenset([late_token(run(family, revised)[0].ids)]))
    odd = (*PROMPT[:2], MASK, 11, *PROMPT[4:6], MASK)
    yield "the mask token and an end in the prompt", replace(plain, ids=odd, eos_ids=frozenset([11]))
    yield "logit bias", with_params(plain, logit_bias={generated[0]: float("-inf"), generated[5]: -2.5, 30: 3.0})


def late_token(generated: tuple[int, ...]) -> int:
    """One that appears for the first time in the middle or later."""
    return next(token for i, token in enumerate(generated) if i >= len(generated) // 3 and token not in generated[:i])


def run(family: str, request: Request, dtype: torch.dtype = torch.float64) -> tuple[Completion, list[DecodingStep]]:
    steps: list[DecodingStep] = []
    return generate_reference(golden_model(family, dtype), request, MASK, steps.append), steps


def record(family: str) -> dict[str, Any]:
    recorded = {}
    for name, request in cases(family):
        (completion, steps), (coarse, coarse_steps) = (run(family, request, d) for d in (torch.float64, torch.float32))
        decided, coarsely = ([(s.tokens, s.accepted, s.edited) for s in each] for each in (steps, coarse_steps))
        assert (completion, decided) == (coarse, coarsely), f"{family}, {name}: rounding decides; choose another request"
        recorded[name] = {"request": as_json(request, MASK), **trajectory(completion, steps)}
    return {"weights": checksum(family), "cases": recorded}


def write(family: str) -> None:
    """One line for every request, result and step, so that a change shows where."""
    recorded = record(family)
    lines = []
    for name, case in recorded["cases"].items():
        steps = ",\n".join(_line(step) for step in case.pop("steps"))
        rest = ",\n".join(f"{_line(key)}:{_line(value)}" for key, value in case.items())
        lines.append(f'{_line(name)}:{{\n{rest},\n"steps":[\n{steps}]}}')
    body = ",\n".join(lines)
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / f"{family}.json").write_text(f'{{"weights":{_line(recorded["weights"])},"cases":{{\n{body}}}}}\n')


def _line(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


if __name__ == "__main__":
    unknown = sorted(set(sys.argv[1:]) - set(KINDS))
    if unknown:
        sys.exit(f"error: no kind {unknown[0]}; choose among {', '.join(KINDS)}")
    for each in sys.argv[1:] or KINDS:
        write(each)
