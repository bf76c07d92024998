"""The autoregressive model's own text, to train drafts for it: chat answers and continuations, greedy and sampled.

    python scripts/embedded/own_text.py --out out/own_text --texts out/free_texts/texts.jsonl --tokens 3_000_000

Writes OUT/SPLIT/chat-greedy-NNNNN.jsonl, conversations whose every assistant turn is the model's (`{"messages": [...]}`), and
OUT/SPLIT/text-greedy-NNNNN.jsonl, continuations of free texts (`{"prompt", "response"}`, for a source with `chat: false`).
Half of the prompts, chosen by their hash, are sampled at temperature 0.8 instead, into chat-sampled and text-sampled. Each
record also has id, kind, temperature, tokens (written by the model) and whether the model ended it. An answer cut off at the
budget is kept and ends its conversation; one that loops is dropped. Killed at any moment, it goes on where it was: a torn last
line is cut off, and prompts that are there or were dropped are skipped. A recipe reads it as two sources:

    - {kind: jsonl, path: out/own_text/train/chat-*.jsonl, weight: 0.65}
    - {kind: jsonl, path: out/own_text/train/text-*.jsonl, weight: 0.35, chat: false}

Owns the order of the work, the files and the progress; prompts are `prompts`' concern, free texts `free_texts`'.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from decoders import Decoded, Decoder, EngineDecoder
from prompts import SPLITS, Prompt, prompts

import unmask
from unmask.engine.llm import LanguageModel
from unmask.files import cut_torn_line

HINTS = (" Answer briefly.", " Answer in one or two sentences.")
HINT_SHARE = 15
"""Percentage of the single-turn prompts that ask to be brief."""
SAMPLED_TEMPERATURE = 0.8
MIN_TURN_TOKENS = 96
TOKENS_PER_JOB = 80
"""Fewer than are written on average, so that the prompts suffice."""
MAX_ASKED_CHARACTERS = 900
"""Of a paragraph that a prompt asks about: prompt and answer fit a training row."""
SHARD_RECORDS = 1_000
PROGRESS_SECONDS = 30.0
SLOT_LENGTH = 512
"""Tokens of a prompt and its answer on a GPU."""


@dataclass
class Job:
    """A conversation or a continuation that the model writes.

    Attributes:
        id: of the prompt.
        kind: of the prompt, or `continuation`.
        split: `train`, `validation` or `test`.
        temperature: of all of its answers.
        turns: the user's turns that are still to be answered, or the one text to continue.
        messages: the conversation so far; empty for a continuation.
        tokens: written by the model so far.
    """

    id: str
    kind: str
    split: str
    temperature: float
    turns: list[str]
    messages: list[dict[str, str]] = field(default_factory=list)
    tokens: int = 0

    @property
    def seed(self) -> int:
        """Of the sampling; another for each answer to a prompt."""
        prompt, _, number = self.id.partition("-")
        return int(prompt, 16) % 2**31 + len(prompt) + int(number or 0)

    @property
    def is_chat(self) -> bool:
        """Whether it is a conversation."""
        return self.kind != "continuation"

    def record(self, response: str, ended: bool) -> dict[str, Any]:
        """What is written to the shard; `response` is of a continuation."""
        content = {"messages": self.messages} if self.is_chat else {"prompt": self.turns[0], "response": response}
        about = {"id": self.id, "kind": self.kind, "temperature": self.temperature}
        return {**about, "tokens": self.tokens, "ended": ended, **content}


class Shards:
    """The files of a run: what is done, and where the next record goes."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.done: set[str] = set()
        self.tokens = 0
        self._counts: dict[tuple[str, str], int] = {}
        self._dropped = out / "dropped.txt"
        for split in ("train", *SPLITS):
            (out / split).mkdir(parents=True, exist_ok=True)
            for path in sorted((out / split).glob("*-*.jsonl")):
                form = path.name.rpartition("-")[0]
                for line in cut_torn_line(path):
                    record = json.loads(line)
                    self.done.add(record["id"])
                    self.tokens += record["tokens"]
                    self._counts[split, form] = self._counts.get((split, form), 0) + 1
        self.dropped = {line.decode() for line in cut_torn_line(self._dropped)} if self._dropped.exists() else set()
        self.done |= self.dropped

    def write(self, split: str, record: dict[str, Any]) -> None:
        """Append a record to the last shard of its kind."""
        form = f"{'chat' if 'messages' in record else 'text'}-{'sampled' if record['temperature'] else 'greedy'}"
        count = self._counts.get((split, form), 0)
        path = self._out / split / f"{form}-{count // SHARD_RECORDS:05}.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._counts[split, form] = count + 1
        self.done.add(record["id"])
        self.tokens += record["tokens"]

    def drop(self, id_: str) -> None:
        """Remember that a prompt's answer is not wanted."""
        with self._dropped.open("a") as file:
            file.write(id_ + "\n")
        self.done.add(id_)
        self.dropped.add(id_)


def loops(text: str) -> bool:
    """Whether a text repeats itself so much that it compresses to under a third."""
    raw = text.encode()
    return len(raw) > 60 and len(zlib.compress(raw, 9)) < 0.34 * len(raw)


def chat_job(prompt: Prompt) -> Job:
    """The job of a prompt; temperature and hint follow from its id."""
    number = int(prompt.id, 16)
    turns = list(prompt.turns)
    if len(turns) == 1 and number // 2 % 100 < HINT_SHARE:
        turns[0] += HINTS[number // 200 % len(HINTS)]
    messages = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
    return Job(prompt.id, prompt.kind, prompt.split, _temperature(prompt.id), turns, messages)


def text_job(record: dict[str, str]) -> Job:
    """The job of a free text's beginning."""
    id_ = Prompt("continuation", (record["prefix"],)).id
    return Job(id_, "continuation", record["split"], _temperature(id_), [record["prefix"]])


def make_jobs(count: int, seed: int, texts: Sequence[dict[str, str]], continuation_share: float, answers: int = 1) -> list[Job]:
    """About `count` jobs in a mixed order, `continuation_share` of them continuations as far as there are texts.

    Every prompt has `answers` jobs: of the first the temperature is by chance, the second's is the other, more are sampled.
    """
    num_prompts = -(-count // answers)
    num_texts = min(len(texts), round(num_prompts * continuation_share))
    rng = random.Random(seed)
    continued = rng.sample(list(texts), num_texts)
    # Texts that are continued are not asked about as well.
    prefixes = {record["prefix"] for record in continued}
    asked = [each["text"] for each in texts if each["prefix"] not in prefixes and len(each["text"]) <= MAX_ASKED_CHARACTERS]
    made = [*map(text_job, continued), *map(chat_job, prompts(num_prompts - num_texts, seed, asked))]
    jobs = list({job.id: job for job in made}.values())
    num_distinct = len(jobs)
    for number in range(1, answers):
        jobs += [_again(job, number) for job in jobs[:num_distinct]]
    rng.shuffle(jobs)
    return jobs


def _again(job: Job, number: int) -> Job:
    is_greedy = number == 1 and job.temperature > 0
    temperature = 0.0 if is_greedy else SAMPLED_TEMPERATURE
    return replace(job, id=f"{job.id}-{number}", temperature=temperature, turns=[*job.turns], messages=[*job.messages])


def read_jobs(path: Path) -> Iterator[Job]:
    """Jobs written by `write_jobs`."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield Job(**json.loads(line))


def write_jobs(path: Path, jobs: Iterable[Job]) -> None:
    """Write jobs that have not begun, a line each."""
    path.write_text("".join(json.dumps(asdict(job), ensure_ascii=False) + "\n" for job in jobs), encoding="utf-8")


class Writer:
    """Runs jobs through one decoder, many at a time, and writes what comes of them."""

    def __init__(self, model: LanguageModel, decoder: Decoder, shards: Shards, *, max_new_tokens: int) -> None:
        assert model.tokenizer is not None
        self._model, self._tokenizer, self._decoder = model, model.tokenizer, decoder
        self._shards, self._max_new_tokens = shards, max_new_tokens
        self.num_decoded = 0

    def run(self, jobs: Iterable[Job], target_tokens: int) -> Iterator[None]:
        """Run jobs until there are none or the shards hold enough tokens; yields after every step of the decoder."""
        waiting = (job for job in jobs if job.id not in self._shards.done)
        running: dict[int, Job] = {}
        while True:
            while self._decoder.room > 0 and self._shards.tokens < target_tokens:
                job = next(waiting, None)
                if job is None:
                    break
                running[self._ask(job)] = job
            if not running:
                return
            for decoded in self._decoder.step():
                self.num_decoded += len(decoded.ids)
                job = running.pop(decoded.number)
                if self._goes_on(job, decoded):
                    running[self._ask(job)] = job
            yield

    def _ask(self, job: Job) -> int:
        if job.is_chat:
            job.messages.append({"role": "user", "content": job.turns.pop(0)})
            ids = self._model.encode_chat(job.messages)
        else:
            ids = self._model.encode_prompt(job.turns[0], chat=False)
        num_turns = len(job.turns) + 1 if job.is_chat else 1
        share = max(MIN_TURN_TOKENS, (self._max_new_tokens - job.tokens) // num_turns)
        budget = min(share, self._max_new_tokens)
        return self._decoder.add(ids, budget=budget, temperature=job.temperature, seed=job.seed)

    def _goes_on(self, job: Job, decoded: Decoded) -> bool:
        """Take in an answer; whether the conversation has another turn. One that is over is written or dropped."""
        ids = decoded.ids[:-1] if decoded.ended else decoded.ids
        text = self._tokenizer.decode(ids)
        job.tokens += len(decoded.ids)
        if not text.strip() or loops(text):
            self._shards.drop(job.id)
            return False
        if job.is_chat:
            job.messages.append({"role": "assistant", "content": text})
            if decoded.ended and job.turns:
                return True
        self._shards.write(job.split, job.record(text, decoded.ended))
        return False


def progress(shards: Shards, num_decoded: int, target: int, seconds: float, cpu_seconds: float) -> str:
    """One line: tokens written, the rate at which they are decoded, time left."""
    rate = num_decoded / seconds
    left = f"{(target - shards.tokens) / rate / 3600:.1f} h left" if rate > 0 else "no rate yet"
    share = f"{shards.tokens:,} of {target:,} tokens ({shards.tokens / target:.1%})"
    rates = f"{rate:.0f} tokens/s, {num_decoded / cpu_seconds:.0f} per CPU second"
    return f"{share}, {rates}, {left}; {len(shards.done):,} prompts, {len(shards.dropped):,} of them dropped"


def _temperature(id_: str) -> float:
    return SAMPLED_TEMPERATURE if int(id_, 16) % 2 else 0.0


def open_decoder(model: LanguageModel, device: str, max_num_seqs: int | None) -> Decoder:
    """The engine on a CPU, slots on a GPU."""
    if device == "cpu":
        return EngineDecoder(model, max_num_seqs or 48)
    from graph_decoder import GraphDecoder

    return GraphDecoder(model.transformer, model.eos_ids, num_slots=max_num_seqs or 2048, max_length=SLOT_LENGTH)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="an autoregressive model with a chat template")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=Path, help="written by free_texts.py [default: no continuations]")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="written by the model, after which it stops")
    parser.add_argument("--seconds", type=float, help="stop after so long [default: no limit]")
    parser.add_argument("--continuations", type=float, default=0.35, help="share of continuations among the prompts")
    parser.add_argument("--answers", type=int, default=1, help="of every prompt; from the second on the temperature differs")
    parser.add_argument("--jobs", type=Path, help="file of the prompts, made first if it is not there [default: in memory]")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of all answers of a conversation together")
    parser.add_argument("--max-num-seqs", type=int, help="answered at the same time [default: 48, on a GPU 2048]")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: then --quantize is none")
    parser.add_argument("--quantize", default="int8", help="auto, none, int8 or int4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nice", type=int, default=19)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def planned_jobs(options: argparse.Namespace) -> Iterable[Job]:
    """The jobs of `--jobs`, or those that the other options ask for."""
    if options.jobs is not None and options.jobs.exists():
        return read_jobs(options.jobs)
    lines = [] if options.texts is None else options.texts.read_text("utf-8").split("\n")
    texts = [json.loads(line) for line in lines if line]
    count = max(100, options.tokens // TOKENS_PER_JOB)
    jobs = make_jobs(count, options.seed, texts, options.continuations, options.answers)
    if options.jobs is not None:
        write_jobs(options.jobs, jobs)
    return jobs


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(argv)
    os.nice(options.nice)
    torch.set_num_threads(options.threads)
    shards = Shards(options.out)
    jobs = planned_jobs(options)
    quantize = options.quantize if options.device == "cpu" else "none"
    model = unmask.load(options.model, quantize=quantize, device=options.device)
    decoder = open_decoder(model, options.device, options.max_num_seqs)
    writer = Writer(model, decoder, shards, max_new_tokens=options.max_new_tokens)
    started, cpu_started = time.perf_counter(), time.process_time()

    def show() -> None:
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        print(progress(shards, writer.num_decoded, options.tokens, seconds, cpu_seconds), flush=True)

    shown = started
    for _ in writer.run(jobs, options.tokens):
        now = time.perf_counter()
        if now - shown >= PROGRESS_SECONDS:
            show()
            shown = now
        if options.seconds is not None and now - started >= options.seconds:
            break
    show()


if __name__ == "__main__":
    main()
