"""lm-eval adapter: the model as an `lm_eval` model, so that every task of that library runs by its own name.

Owns the translation between the library's requests and the engine's. Imports lm-eval: import this file only where it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm.auto import tqdm

from unmask.engine.engine import Engine
from unmask.engine.llm import LanguageModel
from unmask.engine.request import Completion, Request, distinct_samples
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import ConfigError, RequestError
from unmask.eval.likelihood import Likelihood, LikelihoodEstimator
from unmask.eval.provenance import about_model, check_same_run, environment
from unmask.eval.sentences import ensure_punkt
from unmask.eval.speed import Cost, speed_of
from unmask.files import atomic_write, atomic_write_json, bytes_writer, read_json

_DEFAULT_TOKENS = 256
_RESULTS = ("results", "groups", "n-samples", "versions", "higher_is_better")
"""Parts of lm-eval's results that `harness.json` keeps."""
_LENGTH_OPTIONS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_GENERATION_OPTIONS = {"until", "do_sample", "temperature", "top_p", "top_k", "seed", *_LENGTH_OPTIONS}


class HarnessLM(TemplateLM):  # type: ignore[misc]
    """An `lm_eval.api.model.LM`.

    Likelihoods of a diffusion model are bounds, -NELBO; `scored` keeps each with its standard error. Answers come from the
    engine, `batch` at a time; `completions` keeps each with its cost. `truncated` counts prompts that lost their beginning.

    Args:
        model: with a tokenizer.
        samples: Monte Carlo samples per block of the bound.
        seed: of these samples, and of sampled answers whose task sets none.
        batch: answers decoded together.
        decoding: options for every answer.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        samples: int = 16,
        seed: int = 0,
        batch: int = 16,
        decoding: SamplingParams | None = None,
    ) -> None:
        super().__init__()
        if model.tokenizer is None:
            raise ConfigError(f"model {model.name} has no tokenizer; add tokenizer.json to its folder to evaluate it")
        self._model, self._text, self._seed, self._batch = model, model.tokenizer, seed, batch
        self._decoding = decoding or SamplingParams()
        self._samples = samples
        self._templated = False
        self.scored: list[Likelihood] = []
        self.completions: list[Completion] = []
        self.truncated = 0

    @property
    def max_length(self) -> int:
        """Length of the context, in tokens."""
        return self._model.config.max_positions

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self._text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self._text.prefix_ids[0] if self._text.prefix_ids else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Part of lm-eval's cache keys."""
        return self._model.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Source of the template, for lm-eval's records."""
        return self._text.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; from now on texts are encoded with their control tokens.

        Without `add_generation_prompt` the last message is the beginning of an answer, which the model continues.
        """
        self._templated = True
        messages, begun = (chat_history, "") if add_generation_prompt else (chat_history[:-1], chat_history[-1]["content"])
        return self._text.render(messages, add_generation_prompt=True) + begun

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        """Ids of a text; a plain text gets the model's prefix tokens."""
        ids = self._text.encode(string, allow_special=self._templated)
        prefix = [] if self._templated or add_special_tokens is False else [*self._text.prefix_ids]
        return prefix + ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_options: Any
    ) -> list[tuple[float, bool]]:
        fitted = [self._fitted(context, continuation) for _, context, continuation in requests]
        # Sorted, neighbours share their contexts.
        order = sorted(range(len(fitted)), key=lambda i: fitted[i])
        scored = {i: self._estimator.score(*fitted[i]) for i in tqdm(order, desc="likelihoods", disable=disable_tqdm)}
        likelihoods = [scored[i] for i in range(len(fitted))]
        self.scored += likelihoods
        answers = [(each.value, greedy) for each, greedy in zip(likelihoods, self._are_greedy(fitted), strict=True)]
        for (pair, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of the context's length."""
        answers = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
            parts = [self._estimator.score(*make_disjoint_window(window)) for window in windows]
            self.scored += parts
            answers.append(sum(part.value for part in parts))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string."""
        engine_requests = distinct_samples(self._request(*request.args) for request in requests)
        texts = []
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm) as progress:
            completions = self._engine().run(engine_requests, on_completion=lambda _: progress.update(1))
            for request, completion in zip(requests, completions, strict=True):
                assert completion.text is not None, "an engine with a tokenizer gives texts"
                self.completions.append(completion)
                texts.append(completion.text)
                self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def likelihood_note(self) -> dict[str, Any] | None:
        """The kind of this run's likelihoods (exact or a bound), samples per block, and mean standard error in nats."""
        if not self.scored:
            return None
        exact = all(each.exact for each in self.scored)
        error = sum(each.error for each in self.scored) / len(self.scored)
        kind = "exact" if exact else "lower bound (-NELBO)"
        return {"kind": kind, "samples_per_block": None if exact else self._samples, "mean_standard_error": error}

    def speed(self) -> dict[str, Any] | None:
        """Speed of the answers, without those from the cache of an earlier run."""
        costs = [Cost(len(each.ids), each.forwards, each.costs.busy_seconds) for each in self.completions]
        return {**speed_of(costs), "batch": self._batch} if costs else None

    def _engine(self) -> Engine:
        return self._model.engine(max_num_seqs=self._batch)

    @cached_property
    def _estimator(self) -> LikelihoodEstimator:
        """Made when it is needed: it has a KV cache of the whole context."""
        size = self._decoding.block_size
        return LikelihoodEstimator(self._model, samples=self._samples, seed=self._seed, block_size=size)

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The continuation, and as much of the context's end as fits before it."""
        room = self.max_length - len(continuation)
        if room < 1:
            raise RequestError(
                f"a continuation of {len(continuation)} tokens does not fit the context of {self.max_length}; shorten it"
            )
        self.truncated += len(context) > room
        return context[-room:], continuation

    def _are_greedy(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether greedy decoding gives each continuation; a request is aborted at the first token that differs."""
        engine, waiting = self._engine(), dict(enumerate(pairs))
        expected: dict[int, tuple[int, list[int]]] = {}
        same = [False] * len(pairs)
        while waiting or expected:
            while waiting and len(expected) < self._batch:
                i = next(iter(waiting))
                context, continuation = waiting.pop(i)
                request = self._model.request(context, self._decoding, max_new_tokens=len(continuation))
                expected[engine.add(request)] = (i, list(continuation))
            for update in engine.step():
                i, remaining = expected[update.number]
                agrees = remaining[: len(update.new_ids)] == list(update.new_ids)
                expected[update.number] = (i, remaining[len(update.new_ids) :])
                same[i] = agrees and len(remaining) == len(update.new_ids)
                if not agrees or update.completion is not None:
                    engine.abort(update.number)
                    del expected[update.number]
        return same

    def _request(self, context: str, options: Mapping[str, Any]) -> Request:
        unknown = options.keys() - _GENERATION_OPTIONS
        if unknown:
            known = ", ".join(sorted(_GENERATION_OPTIONS))
            raise ConfigError(f"generation option {min(unknown)} of a task is not known; use one of {known}")
        most = next((int(options[name]) for name in _LENGTH_OPTIONS if name in options), _DEFAULT_TOKENS)
        ids = self.tok_encode(context)
        room = self.max_length - min(most, self.max_length - 1)
        self.truncated += len(ids) > room
        stop = options.get("until", ())
        sampled = {name: options[name] for name in ("temperature", "top_p", "top_k", "seed") if name in options}
        sampling = {"temperature": 1.0, "seed": self._seed} | sampled if options.get("do_sample") else {}
        return self._model.request(
            ids[-room:],
            self._decoding,
            max_new_tokens=self.max_length - room,
            stop=[stop] if isinstance(stop, str) else [text for text in stop if text],
            **sampling,
        )


def check_names(names: Sequence[str]) -> TaskManager:
    """Where lm-eval's tasks are looked up, for `run_harness`: it takes seconds to make.

    Raises:
        ConfigError: a name that lm-eval does not know, before anything else is evaluated.
    """
    manager = TaskManager(metadata={})
    unknown = [name for name in names if not manager.match_tasks([name]) and not Path(name).exists()]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is a task neither of ours (unmask eval --list) nor of lm-eval")
    return manager


def run_harness(
    model: LanguageModel,
    names: Sequence[str],
    folder: Path,
    *,
    limit: int | None,
    chat: bool,
    allow_code: bool = False,
    manager: TaskManager | None = None,
    decoding: SamplingParams = SamplingParams(),
    **options: Any,
) -> dict[str, Any]:
    """Run tasks of lm-eval by its own names; the content of `harness.json`.

    Args:
        model: with a tokenizer.
        names: tasks or groups of lm-eval.
        folder: of `harness.json`, `harness_samples.jsonl` and the cache of answers, from which a killed run is resumed.
        limit: items per task; None: all.
        chat: apply the chat template to prompts.
        allow_code: let lm-eval execute code that the model writes, without our sandbox.
        manager: where tasks are looked up; all of lm-eval's where None.
        decoding: options for every answer.
        options: others of `HarnessLM`.

    Raises:
        ConfigError: lm-eval does not know a task, its data is not available, or the folder holds results of another model or
            of other options.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lm = HarnessLM(model, decoding=decoding, **options)
    head = {"model": about_model(model), "options": {**options, "chat": chat, "decoding": decoding.given()}}
    if (folder / "harness.json").exists():
        check_same_run(folder, read_json(folder / "harness.json"), head)
    key = hashlib.blake2b(json.dumps(head, sort_keys=True).encode(), digest_size=8).hexdigest()
    sentences = ensure_punkt(map(str, names))
    try:
        evaluated = simple_evaluate(
            lm,
            tasks=list(names),
            limit=limit,
            use_cache=str(folder / f"answers-{key}"),
            apply_chat_template=chat,
            confirm_run_unsafe_code=allow_code,
            task_manager=manager,
            bootstrap_iters=1000,
        )
    except (ImportError, KeyError, OSError, ValueError) as error:
        reason = f"{' '.join(str(error).split())[:300]}; see `lm-eval ls tasks`, and go online where data is missing"
        raise ConfigError(f"lm-eval cannot run {', '.join(map(str, names))}: {reason}") from error
    _write_samples(folder / "harness_samples.jsonl", evaluated.get("samples", {}))
    return _write_results(folder / "harness.json", evaluated, lm, {"limit": limit, **head, "sentences": sentences})


def _write_results(path: Path, evaluated: Mapping[str, Any], lm: HarnessLM, about: Mapping[str, Any]) -> dict[str, Any]:
    content = {
        **{name: evaluated[name] for name in _RESULTS if name in evaluated},
        **about,
        "likelihood": lm.likelihood_note(),
        "truncated": lm.truncated,
        "speed": lm.speed(),
        "environment": environment(),
    }
    results: dict[str, Any] = json.loads(json.dumps(content, default=str))
    atomic_write_json(path, results)
    return results


def _write_samples(path: Path, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    lines = (json.dumps({"task": task, **each}, default=str) + "\n" for task, rows in samples.items() for each in rows)
    atomic_write(path, bytes_writer("".join(lines).encode()))
