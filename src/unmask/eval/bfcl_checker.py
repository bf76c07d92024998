"""BFCL checker: bfcl-eval's prompts, and its verdicts on answers; JSON lines in, JSON lines out.

A script, executed by the Python of bfcl-eval's own environment. Imports that package and never unmask.
"""

from __future__ import annotations

import ast
import json
import os
import resource
import signal
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

MODEL = "unmask"
SECONDS, MEMORY_BYTES = 10.0, 2 << 30
"""For one answer, and for the process: an answer may say 9**9**9."""
_ARITHMETIC = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Constant, ast.List, ast.Tuple, ast.Load)


class TooLong(BaseException):
    """Parsing an answer takes too long; not an Exception, since the package catches those."""

    @classmethod
    def stop(cls, *_: object) -> None:
        """Signal handler of the alarm."""
        raise cls


def bfcl(name: str) -> Any:
    """A module of the package."""
    return import_module(f"bfcl_eval.{name}")


def prepare() -> None:
    """Keep the package from importing every vendor's client, and from evaluating code that a model wrote."""
    table = types.ModuleType("bfcl_eval.constants.model_config")
    # It is asked only whether dots in names became underscores, as they do where an API calls functions.
    table.__dict__["MODEL_CONFIG_MAPPING"] = {MODEL: types.SimpleNamespace(underscore_to_dot=False)}
    sys.modules[table.__name__] = table
    bfcl("model_handler.utils").eval = arithmetic


def arithmetic(source: str) -> Any:
    """Value of an expression of constants; bfcl-eval itself evaluates any, such as `__import__("os").getcwd() + ""`.

    Raises:
        ValueError: the expression holds a name or a call; the answer then counts as unreadable, as officially with a name.
    """
    tree = ast.parse(source, mode="eval")
    if not all(isinstance(node, _ARITHMETIC) for node in ast.walk(tree)):
        raise ValueError(f"{source[:200]} is no arithmetic")
    return eval(compile(tree, "answer", "eval"), {"__builtins__": {}})


def prompts(categories: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Every question of the categories, as the conversation for a model without function calling."""
    utils, handler = bfcl("utils"), bfcl("model_handler.utils")
    for category in categories:
        for entry in utils.load_dataset_entry(category):
            (turn,) = entry["question"]
            messages = handler.system_prompt_pre_processing_chat_model(turn, entry["function"], entry["id"])
            yield {"id": entry["id"], "category": category, "messages": messages}


@cache
def truths(category: str) -> dict[str, tuple[Any, Any]]:
    """Question id -> functions and possible answers, of one category."""
    utils = bfcl("utils")
    entries = utils.load_dataset_entry(category, include_language_specific_hint=False)
    known = [] if utils.is_relevance_or_irrelevance(category) else utils.load_ground_truth_entry(category)
    answers = {entry["id"]: entry["ground_truth"] for entry in known}
    return {entry["id"]: (entry["function"], answers.get(entry["id"])) for entry in entries}


def verdicts(answers: Iterable[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """For each answer whether it is right, the calls that were parsed from it, and the problem."""
    signal.signal(signal.SIGALRM, TooLong.stop)
    with suppress(OSError, ValueError):  # macOS has no such limit, and a lower one may be in force
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for each in answers:
        functions, possible = truths(each["category"])[each["id"]]
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            calls, problem = verdict(each["category"], each["answer"], functions, possible)
        except TooLong:
            calls, problem = None, f"not read within {SECONDS:g} seconds"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        yield {"value": float(problem is None), "calls": calls, "problem": problem}


def verdict(category: str, answer: str, functions: Any, possible: Any) -> tuple[str | None, str | None]:
    """The calls, if they can be parsed, and the problem; as `_evaluate_single_*_entry` of bfcl_eval's `eval_runner`."""
    utils, enums = bfcl("utils"), bfcl("constants.enums")
    language = "java" if utils.is_java(category) else "javascript" if utils.is_js(category) else "python"
    text, problem = None, None
    try:
        calls = bfcl("model_handler.utils").default_decode_ast_prompting(answer, enums.ReturnFormat(language))
        text = repr(calls)[:2000]
    except Exception as error:
        problem = _line(f"ast_decoder:decoder_failed: {type(error).__name__}: {error}")
    if utils.is_relevance_or_irrelevance(category):
        called = problem is None and not utils.is_empty_output(calls)
        if "irrelevance" in category:
            return text, "irrelevance_error:decoder_success" if called else None
        return text, None if called else "relevance_error:decoder_failed"
    if problem is None and not utils.is_function_calling_format_output(calls):
        problem = "ast_decoder:decoder_wrong_output_format"
    if problem is not None:
        return text, problem
    check = bfcl("eval_checker.ast_eval.ast_checker").ast_checker
    try:
        result = check(functions, calls, possible, enums.Language(language), category, MODEL)
    except Exception as error:  # officially this ends the whole run
        return text, _line(f"checker failed: {type(error).__name__}: {error}")
    return text, None if result["valid"] else _line(f"{result['error_type']}: {' '.join(map(str, result['error']))}")


def _line(text: str) -> str:
    return " ".join(text.split())[:500]


def main() -> None:
    """Mode `prompts` or `score`, from stdin to stdout; what the package prints goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        prepare()
        records: Iterator[Any] = map(json.loads, sys.stdin)
        replies = prompts(records) if sys.argv[1] == "prompts" else verdicts(records)
        out.writelines(json.dumps(reply) + "\n" for reply in replies)


if __name__ == "__main__":
    main()
