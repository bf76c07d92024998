"""Thousands of random requests through one engine with too little memory, each compared with the same request served alone.

    python benchmarks/soak.py [--requests 10000] [--seed 0]

Requests differ in length, block size, policy, editing, sampling, stops, holes, grammars and priority; some are aborted at a
random moment. The model is tiny and in float64, so that what is compared is the engine's bookkeeping and not how a matrix
product rounds at another number of rows. Checked after every step: no cache block lost or in two states, none
written by two sequences, no published block written. Checked at the end: every output equals solo decoding, no cache block
is in use, and how long the least lucky request waited. Writes its figures to benchmarks/results/.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import arguments, results_path, write_results
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from unmask.data.tokenizer import load_tokenizer
from unmask.engine.engine import Engine
from unmask.engine.grammar import Grammar, GrammarCompiler
from unmask.engine.request import Completion, Request
from unmask.engine.sampling_params import ResolvedParams
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Transformer

EOS, MASK = 256, 257
SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {"enum": ["red", "green", "greenish"]},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 4},
)
PATTERNS = ("[a-c]{2,9}", "(ab|cd)*x", "[0-9]{4}-[0-9]{2}")


def make_model(seed: int) -> Transformer:
    """A random model over bytes; decisive enough that its answers differ."""
    config = ModelConfig(
        family="qwen3", vocab_size=260, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=24,
        max_positions=512, qk_norm=True, mask_id=MASK, block_size=8, eos_ids=(EOS,),
    )  # fmt: skip
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # norms stay at one
            torch.nn.init.normal_(parameter, std=0.7, generator=generator)
    return model.double().eval()


def make_grammars() -> list[Grammar]:
    """Grammars over single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", mask_token="<mask>")
    with tempfile.TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        compiler = GrammarCompiler(load_tokenizer(Path(folder)), [EOS], 260)
    return [*map(compiler.json_schema, SCHEMAS), *map(compiler.regex, PATTERNS)]


def random_request(rng: random.Random, grammars: list[Grammar]) -> Request:
    """One of everything, now and then; prompts share beginnings."""
    size = rng.choice([2, 4, 8, 8, 8, 12])
    rules: dict[str, Any] = {"block_size": size, "threshold": rng.choice([0.0, 0.2, 0.5, 0.95, 1.0])}
    rules["steps"] = rng.choice([1, 2, size])
    kind = rng.random()
    if kind < 0.15:
        rules |= {
            "edit_threshold": rng.choice([0.0, 0.4]),
            "max_post_steps": rng.choice([0, 2, 4]),
            "window": rng.choice([1, 2]),
        }
    elif kind < 0.25:
        rules |= {"policy": rng.choice(["entropy", "fixed"]), "entropy_bound": 2.0}
    if rng.random() < 0.3:
        rules |= {
            "temperature": 0.9,
            "top_k": rng.choice([None, 20]),
            "top_p": rng.choice([None, 0.9]),
            "seed": rng.randrange(9),
        }
    shared = random.Random(rng.randrange(6))
    ids: list[int | None] = [shared.randrange(256) for _ in range(rng.randrange(1, 40))]
    ids += [rng.randrange(256) for _ in range(rng.randrange(6))]
    plain = kind >= 0.25
    grammar = rng.choice(grammars) if plain and rng.random() < 0.15 else None
    if grammar is None and rng.random() < 0.1:
        place = rng.randrange(len(ids))
        ids[place : place + 3] = [None] * 3
    budget = rng.randrange(1, 40)
    ends = [] if grammar is not None else rng.sample(range(256), rng.choice([0, 0, 6]))
    params = ResolvedParams(
        **rules,
        max_new_tokens=budget,
        stop=("a", "zz") if rng.random() < 0.1 else (),
        min_new_tokens=rng.choice([0, 0, 0, min(3, budget)]),
        logit_bias={rng.randrange(256): rng.choice([3.0, float("-inf")])} if rng.random() < 0.1 else {},
        logprobs=rng.choice([None, None, 1]),
    )
    return Request(
        tuple(ids),
        params,
        frozenset([EOS, *ends]),
        grammar=grammar,
        sample=rng.randrange(3),
        priority=rng.choice([0, 0, 0, -1, 2]),
    )


def text_of(ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
    return "".join(chr(97 + token % 26) for token in ids)


def check_cache_blocks(engine: Engine) -> None:
    """No cache block lost, shared wrongly, or open to writing while others read it."""
    pool, running = engine.pool, engine.scheduler.running
    pool.check()
    users = Counter(cache_block for sequence in running for cache_block in sequence.block_table)
    for cache_block, count in users.items():
        assert pool.ref_count(cache_block) == count, f"cache block {cache_block}: {pool.ref_count(cache_block)}, not {count}"
    assert pool.num_used == len(users), "a cache block is used by nobody that runs"
    for sequence in running:
        for cache_block in sequence.block_table[sequence.committed // engine.cache_block_size :]:
            assert not pool.is_published(cache_block), "a cache block that will be written is shared"
    assert all(not sequence.block_table for sequence in engine.scheduler.waiting), "a waiting sequence has cache blocks"


def soak(num_requests: int, seed: int, progress: Progress | None = None) -> dict[str, Any]:
    """Serve, abort, compare; returns the counts. Any violation is an AssertionError."""
    rng, model, grammars = random.Random(seed), make_model(seed), make_grammars()
    requests = [random_request(rng, grammars) for _ in range(num_requests)]
    aborted = {number: rng.randrange(1, 40) for number in range(num_requests) if rng.random() < 0.1}
    engine = Engine(model, decode=text_of, num_tokens=208, cache_block_size=8, max_num_seqs=12, max_num_batched_tokens=64)
    found: dict[int, Completion] = {}
    age: Counter[int] = Counter()
    emitted: dict[int, list[int]] = {}
    preemptions = most_waiting = added = steps = 0
    task = None if progress is None else progress.add_task("serving", total=num_requests)
    started = time.perf_counter()
    while added < num_requests or engine.has_work:
        while added < num_requests and len(engine.scheduler.waiting) < 24 and rng.random() < 0.8:
            assert engine.add(requests[added]) == added
            added += 1
        live = [s.number for s in (*engine.scheduler.waiting, *engine.scheduler.running)]
        for number in live:
            age[number] += 1
            if age[number] == aborted.get(number):
                engine.abort(number)
        for update in engine.step():
            assert update.error is None, update.error
            emitted.setdefault(update.number, []).extend(update.new_ids)
            if update.completion is not None:
                found[update.number] = update.completion
                preemptions += update.completion.costs.preemptions
                most_waiting = max(most_waiting, age[update.number])
                assert tuple(emitted[update.number]) == update.completion.ids, "what was handed out was taken back"
                if progress is not None and task is not None:
                    progress.update(task, advance=1)
        check_cache_blocks(engine)
        steps += 1
    seconds = time.perf_counter() - started
    assert engine.pool.num_used == 0, "a cache block leaked"
    cached = sum(completion.costs.cached_tokens for completion in found.values())
    compare(model, requests, found, progress)
    return {
        "requests": num_requests, "completed": len(found), "aborted": num_requests - len(found), "steps": steps,
        "preemptions": preemptions, "cached_tokens": cached, "longest_stay_steps": most_waiting, "seconds": seconds,
        "requests_per_second": num_requests / seconds,
    }  # fmt: skip


def compare(model: Transformer, requests: list[Request], found: dict[int, Completion], progress: Progress | None) -> None:
    """Every completion equals that of an engine with nothing else to do and nothing in its cache."""
    task = None if progress is None else progress.add_task("comparing with solo decoding", total=len(found))
    for number, completion in found.items():
        request = requests[number]
        solo = Engine(model, decode=text_of, num_tokens=request.canvas_length + 16, prefix_cache=False).run([request])[0]
        assert replace(solo, forwards=0) == replace(completion, forwards=0), (
            f"request {number}: {request}\n{solo}\n{completion}"
        )
        if progress is not None and task is not None:
            progress.update(task, advance=1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.smoke:
        options.requests = 20
    torch.set_num_threads(1)
    with Progress(console=Console(stderr=True)) as progress:
        figures = soak(options.requests, options.seed, progress)
    for name, value in figures.items():
        print(f"{name:<22}{value:,.1f}" if isinstance(value, float) else f"{name:<22}{value:,}")
    print("all outputs equal solo decoding; no cache block leaked, none shared wrongly, nobody starved")
    write_results(results_path(options.results, "soak"), figures)


if __name__ == "__main__":
    main()
