"""llama.cpp, asked line by line: `{"ids": [...], "tokens": n}` in; out what `turns.Answer` holds.

    python benchmarks/reproduction/rival.py FILE.gguf THREADS
    python benchmarks/reproduction/rival.py --quantize Q4_0 FILE.gguf OUT.gguf     # nothing is asked: weights of another kind
    python benchmarks/reproduction/rival.py --predict FILE.gguf     # of `{"ids": [...], "first": n}`, the ids from n on

Needs llama-cpp-python and nothing of ours, so that it may live in an environment of its own. Greedy; an end-of-text token does
not end an answer: how long it is, is not the question here. The first line out says the version.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from itertools import islice

import llama_cpp
import numpy as np


def quantize(kind: str, source: str, out: str) -> None:
    """Write the weights of a GGUF file as another kind, by llama.cpp's own quantiser, from quantised ones too."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = True
    status = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
    if status != 0:
        sys.exit(f"error: llama.cpp's quantiser failed ({status}) on {source}")


def predict(path: str) -> None:
    """For each token of the lines that is predicted: the likeliest one, and the loss of the true one in nats."""
    model = llama_cpp.Llama(path, n_ctx=1024, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    for line in sys.stdin:
        asked = json.loads(line)
        ids, first = asked["ids"], asked["first"]
        model.reset()
        model.eval(ids)
        logits = model.scores[first - 1 : len(ids) - 1].astype(np.float64)
        targets = np.asarray(ids[first:])
        normalizers = np.logaddexp.reduce(logits, axis=1)
        losses = normalizers - logits[np.arange(len(targets)), targets]
        print(json.dumps({"likeliest": logits.argmax(1).tolist(), "losses": losses.tolist()}), flush=True)


def main() -> None:
    if sys.argv[1] == "--predict":
        predict(sys.argv[2])
        return
    if sys.argv[1] == "--quantize":
        quantize(*sys.argv[2:])
        return
    path, threads = sys.argv[1], int(sys.argv[2])
    model = llama_cpp.Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    print(json.dumps(llama_cpp.__version__), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        model.reset()  # nothing of the last prompt is reused, as on our side
        started = time.perf_counter()
        marks = [time.perf_counter() - started for _ in islice(model.generate(asked["ids"], temp=0.0), asked["tokens"])]
        found = {"tokens": len(marks), "seconds": marks[-1], "first_tokens": 1, "first_seconds": marks[0]}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
