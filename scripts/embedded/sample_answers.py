"""Self-distillation data: the autoregressive model's own answers to several thousand prompts.

    python scripts/embedded/sample_answers.py --out out/answers.jsonl --count 4000

Greedy answers, so that they are low in entropy. Each prompt is asked with a short instruction to be brief, which is left out of
what is written: the diffusion model learns to be brief by itself. Answers that do not end within the budget, or that loop, are
dropped and counted. Prompts already in the file are skipped, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from pathlib import Path

from prompts import prompts as make_prompts

import unmask
from unmask.engine.llm import LanguageModel

HINTS = (" Answer briefly.", " Answer in one or two sentences.")


def loops(text: str) -> bool:
    """Whether an answer repeats itself so much that it compresses to under a third."""
    raw = text.encode()
    return len(raw) > 60 and len(zlib.compress(raw, 9)) < 0.34 * len(raw)


def sample(model: LanguageModel, questions: list[str], out: Path, *, max_new_tokens: int, batch: int, seed: int) -> None:
    done = {json.loads(line)["prompt"] for line in out.read_text().splitlines()} if out.exists() else set()
    todo = [question for question in questions if question not in done]
    tokenizer = model.tokenizer
    assert tokenizer is not None
    encoded = []
    for number, question in enumerate(todo):
        message = {"role": "user", "content": question + HINTS[number % len(HINTS)]}
        encoded.append((tuple(tokenizer.chat([message], add_generation_prompt=True)), question))
    kept = dropped = 0
    started = time.perf_counter()
    with out.open("a") as file:
        for start in range(0, len(encoded), batch):
            part = sorted(encoded[start : start + batch], key=lambda pair: len(pair[0]))
            requests = [model.request(ids, max_new_tokens=max_new_tokens, seed=seed) for ids, _ in part]
            answers = model.engine(max_num_seqs=batch).run(requests)
            for (_, question), answer in zip(part, answers, strict=True):
                text = tokenizer.decode(answer.ids).strip()
                if answer.finish_reason != "stop" or not text or loops(text):
                    dropped += 1
                    continue
                kept += 1
                file.write(json.dumps({"prompt": question, "response": text}) + "\n")
            file.flush()
            rate = (kept + dropped) / (time.perf_counter() - started)
            left = (len(encoded) - kept - dropped) / rate
            print(f"{kept} kept, {dropped} dropped, {rate:.1f} answers/s, {left / 60:.1f} min left", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    model = unmask.load(options.model)
    sample(
        model,
        make_prompts(options.count, options.seed),
        options.out,
        max_new_tokens=options.max_new_tokens,
        batch=options.batch,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
