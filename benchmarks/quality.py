"""Quality beside speed: share of right answers on fresh reasoning-gym problems, and tokens per forward of the same run.

    python benchmarks/quality.py [--model smollm2-135m-converted] [--count 40] [--thresholds 0.95,0.8]

The problems are of the families the embedded model was trained on, from seeds it was not. The autoregressive base answers the
same problems, asked the same way. Scores come from reasoning-gym's own checkers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import reasoning_gym
from common import arguments

import unmask
from unmask.engine.llm import LanguageModel

FAMILIES: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "word_sequence_reversal": {"min_words": 3, "max_words": 5},
}
UNSEEN_SEED = 987_654_321


def score(model: LanguageModel, family: str, count: int, **options: Any) -> tuple[float, float]:
    """Share of right answers (lower-cased exact answers count in full) and tokens per forward."""
    problems = reasoning_gym.create_dataset(family, seed=UNSEEN_SEED, size=count, **FAMILIES[family])
    right, tokens, forwards = 0.0, 0, 0
    for problem in problems:
        answer = model.generate(problem["question"], max_new_tokens=32, **options)
        right += float(problems.score_answer(answer.text.strip(), problem) == 1.0)
        tokens, forwards = tokens + answer.completion_tokens, forwards + answer.forwards
    return right / count, tokens / forwards


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m-converted")
    parser.add_argument("--autoregressive", default="smollm2-135m")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--thresholds", default="0.95,0.8")
    options = parser.parse_args(argv)
    if options.smoke:
        options.count = 1
    model, base = unmask.load(options.model), unmask.load(options.autoregressive)
    print(f"{'':<26}{'way':<28}{'right':>8}{'tokens per forward':>22}")
    for family in FAMILIES:
        right, per_forward = score(base, family, options.count)
        print(f"{family:<26}{'autoregressive':<28}{right:>8.0%}{per_forward:>22.2f}")
        for threshold in (float(value) for value in options.thresholds.split(",")):
            right, per_forward = score(model, family, options.count, threshold=threshold)
            print(f"{family:<26}{f'diffusion, threshold {threshold}':<28}{right:>8.0%}{per_forward:>22.2f}")


if __name__ == "__main__":
    main()
