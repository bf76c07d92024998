"""Everyday questions, where few drafts hold: tokens per forward, and tokens/s of the child against its control by turns.

    python benchmarks/reproduction/general.py [--child MODEL] [--questions 40]

The questions are some of scripts/embedded/answers.jsonl; both answer each, one after the other.
"""

from __future__ import annotations

import argparse
import json

from turns import Answer, answer, tokens_per_second

import unmask
from data import ANSWERS
from unmask.engine.llm import LanguageModel
from unmask.models.arch.gated_lora import autoregressive_parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", default="smollm2-135m-diffusion")
    parser.add_argument("--questions", type=int, default=40)
    options = parser.parse_args()
    child = unmask.load(options.child, quantize="auto")
    control = LanguageModel(autoregressive_parent(child.transformer), None, name="control", quantize="auto")
    for each in (child, control):
        each.backend(wait=True)  # the kernels may have to be compiled
    questions = [json.loads(line)["prompt"] for line in ANSWERS.read_text().splitlines()]
    taken: dict[str, list[Answer]] = {"child": [], "control": []}
    for number, question in enumerate(questions[:: len(questions) // options.questions][: options.questions]):
        ids = child.encode_prompt(question)
        asked = {"child": (child, ids), "control": (control, (child.config.start_id, *ids))}
        for name, (model, prompt) in asked.items():
            if number == 0:
                answer(model, model.request(prompt, max_new_tokens=64))  # unseen: the weights are read
            taken[name].append(answer(model, model.request(prompt, max_new_tokens=64)))
    speeds = {name: tokens_per_second(answers) for name, answers in taken.items()}
    tokens, forwards = sum(each.tokens for each in taken["child"]), sum(each.forwards for each in taken["child"])
    print(f"{options.questions} questions, {tokens} tokens, {tokens / forwards:.2f} per forward")
    ratio = speeds["child"] / speeds["control"]
    print(f"tokens/s: child {speeds['child']:.0f}, control {speeds['control']:.0f}, {ratio:.2f} times")


if __name__ == "__main__":
    main()
