"""Every implementation against the recorded trajectories: tokens, accepted and edited positions, confidences, step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conformance.adapter import Implementation, implementations
from conformance.models import KINDS, checksum, save_golden_model
from conformance.record import GOLDEN, cases
from tiny import MASK

IMPLEMENTATIONS = implementations()
RECORDED = {family: json.loads((GOLDEN / f"{family}.json").read_text()) for family in KINDS}
CONFIDENCE_ERROR = {"engine-float32": 1e-4, "engine-native-float32": 1e-4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_golden_model(family, tmp_path_factory.mktemp("golden") / family) for family in KINDS}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", KINDS)
def test_trajectories_are_the_recorded_ones(folders: dict[str, Path], family: str, implementation: str) -> None:
    generate, error = IMPLEMENTATIONS[implementation], CONFIDENCE_ERROR.get(implementation, 1e-5)
    for name, case in RECORDED[family]["cases"].items():
        check(generate, folders[family], case, f"{implementation}, {family}, {name}", error)


def check(generate: Implementation, folder: Path, case: dict[str, Any], where: str, error: float) -> None:
    found = generate(folder, case["request"])
    assert (found["ids"], found["finish_reason"]) == (case["ids"], case["finish_reason"]), where
    if "steps" not in found:
        return  # an engine that does not show its steps
    assert len(found["steps"]) == len(case["steps"]), where
    for number, (step, expected) in enumerate(zip(found["steps"], case["steps"], strict=True)):
        for key in ("start", "tokens", "accepted", "edited"):
            assert step[key] == expected[key], f"{where}, step {number}: {key}"
        for confidence, recorded in zip(step["confidence"], expected["confidence"], strict=True):
            assert (confidence is None) == (recorded is None), f"{where}, step {number}"
            assert confidence is None or confidence == pytest.approx(recorded, abs=error), f"{where}, step {number}"


@pytest.mark.parametrize("family", KINDS)
def test_the_models_are_those_of_the_recording(family: str) -> None:
    assert checksum(family) == RECORDED[family]["weights"], "the models changed, not the decoder: run record.py"
    assert list(RECORDED[family]["cases"]) == [name for name, _ in cases(family)], "cases changed: run record.py"


def test_the_recording_is_worth_comparing_with() -> None:
    """Ends, edits, unlike tokens and several commits in a step all occur; the mask token never is a result."""
    recorded = [case for family in KINDS for case in RECORDED[family]["cases"].values()]
    steps = [step for case in recorded for step in case["steps"]]
    assert sum(case["finish_reason"] == "stop" for case in recorded) >= 8
    assert sum(bool(step["edited"]) for step in steps) >= 40
    assert sum(len(step["accepted"]) > 1 for step in steps) >= 40
    assert sum(len(set(case["ids"])) >= 5 for case in recorded) >= len(recorded) // 3
    assert not any(MASK in case["ids"] for case in recorded)
    assert sum(file.stat().st_size for file in GOLDEN.iterdir()) < 300_000


def test_a_wrong_trajectory_is_noticed(folders: dict[str, Path]) -> None:
    """The suite fails for an implementation that is off by a little."""
    case = RECORDED["llama"]["cases"]["threshold 0.9"]
    reference = IMPLEMENTATIONS["reference"]

    def altered(key: str) -> Implementation:
        def generate(folder: Path, request: Any) -> dict[str, Any]:
            result = json.loads(json.dumps(reference(folder, request)))
            if key == "ids":
                result["ids"][-1] += 1
            elif key == "confidence":
                row = result["steps"][1]["confidence"]
                place = next(i for i, value in enumerate(row) if value is not None)
                row[place] += 1e-3
            else:
                result["steps"][1][key].append(99)
            return result

        return generate

    check(reference, folders["llama"], case, "as it is", 1e-5)
    for key in ("ids", "tokens", "accepted", "edited", "confidence"):
        with pytest.raises(AssertionError):
            check(altered(key), folders["llama"], case, key, 1e-5)
