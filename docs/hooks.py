"""What the documentation takes from the code instead of repeating it, and the check that what it names exists.

In a page, a comment of its own paragraph is replaced:

- `help: VERB` by what `unmask VERB --help` prints;
- `options: SURFACE` by a table of the decoding options declared for the command line (`cli`), the section `diffusion` of HTTP
  bodies, or (without SURFACE) anywhere;
- `api: DOTTED.NAME` by the signature and docstring of a function, method or class;
- `recipe: CLASS` by a table of that recipe section's keys; lines `key: text` in the same comment describe the keys
  whose schema has no description;
- `suite: NAME` by a table of a benchmark suite: what runs each benchmark, and its published scores.

Every `unmask....` name and every `tests/....py` path in backticks must exist. What is wrong is logged as a warning, which
`mkdocs build --strict` turns into a failure. Owns nothing of the site's look; knows of the package only public names.
"""

from __future__ import annotations

import ast
import inspect
import logging
import os
import pkgutil
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from unmask.engine.sampling_params import Option, SamplingParams, Surface

ROOT = Path(__file__).parents[1]
LOG = logging.getLogger("mkdocs.hooks.unmask")
_PLACE = re.compile(r"^<!-- (help|api|options|recipe|suite): ?([\w.]*(?:-[\w.]+)*)\n?(.*?)-->$", re.DOTALL | re.MULTILINE)
_CODE_NAME = re.compile(r"`(unmask(?:\.\w+)+)(?:\(\))?`")
_TEST_PATH = re.compile(r"`(tests/[\w/.]+)`")
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Source|Departs):", re.MULTILINE)
_WIDTH = 96


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the places of one page and check the names on it."""
    where = page.file.src_uri
    makers = {"help": command_help, "api": api, "options": options_table, "recipe": recipe_table, "suite": suite_table}
    filled = _PLACE.sub(lambda found: makers[found[1]](found[2], found[3], where), markdown)
    for name in set(_CODE_NAME.findall(markdown)):
        _resolve(name, where)
    for path in set(_TEST_PATH.findall(markdown)):
        if not (ROOT / path).exists():
            LOG.warning("%s: there is no %s", where, path)
    return filled


def command_help(verb: str, _: str, where: str) -> str:
    """The help of a command as a code block; of the program itself when `verb` is empty."""
    command = [str(Path(sys.executable).with_name("unmask")), *verb.split(), "--help"]
    environment = os.environ | {"COLUMNS": str(_WIDTH), "TYPER_USE_RICH": "0", "NO_COLOR": "1"}
    try:
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        LOG.warning("%s: `unmask %s --help` failed: %s", where, verb, error)
        return ""
    return f"```text\n{ran.stdout.strip()}\n```"


def api(name: str, _: str, where: str) -> str:
    """Signature and docstring of a public name."""
    thing = _resolve(name, where)
    if thing is None:
        return ""
    node: Any = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    if isinstance(node, ast.ClassDef):
        fields = [ast.unparse(line) for line in node.body if isinstance(line, ast.AnnAssign)]
        head = "\n    ".join([f"class {node.name}:", *fields])
    else:
        pieces, returns = _arguments(node.args), ast.unparse(node.returns)
        head = f"{node.name}({', '.join(pieces)}) -> {returns}"
        if len(head) > _WIDTH:
            lines = "".join(f"    {piece},\n" for piece in pieces)
            head = f"{node.name}(\n{lines}) -> {returns}"
    return f"```python\n{head}\n```\n\n{_docstring(inspect.getdoc(thing) or '')}"


def _arguments(arguments: ast.arguments) -> list[str]:
    """Each argument as it is written in a signature, `self` left out."""

    def spell(argument: ast.arg, default: ast.expr | None, stars: str = "") -> str:
        annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
        return f"{stars}{argument.arg}{annotation}" + (f" = {ast.unparse(default)}" if default else "")

    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    pieces = [spell(*pair) for pair in zip(plain, defaults, strict=True) if pair[0].arg != "self"]
    if arguments.vararg is not None:
        pieces.append(spell(arguments.vararg, None, "*"))
    elif arguments.kwonlyargs:
        pieces.append("*")
    pieces += [spell(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return pieces if arguments.kwarg is None else [*pieces, spell(arguments.kwarg, None, "**")]


def _docstring(text: str) -> str:
    """Google-style sections as Markdown: arguments as a list, the rest as paragraphs."""
    lead, *sections = _SECTION.split(text)
    parts = [lead.strip()]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        lines = textwrap.dedent(body.strip("\n")).splitlines() if body.startswith("\n") else [body.strip()]
        items = "\n".join(lines) if title == "Returns" else re.sub(r"(?m)^(\w+(?:, \w+)*): ", r"- `\1`: ", "\n".join(lines))
        parts.append(f"**{title}**\n\n{items}")
    return "\n\n".join(parts)


def options_table(surface: str, _: str, where: str) -> str:
    """The decoding options: type and range, default, meaning."""
    if surface not in ("", *get_args(Surface)):
        LOG.warning("%s: decoding options have no surface %s", where, surface)
    lines = ["| option | value | default | meaning |", "|---|---|---|---|"]
    for option in SamplingParams.options().values():
        if surface in ("", *option.surfaces):
            name = f"--{option.name.replace('_', '-')}" if surface == "cli" else option.name
            lines.append(f"| `{name}` | {_value(option, surface)} | {option.shown_default} | {option.help} |")
    return "\n".join(lines)


def _value(option: Option, surface: str) -> str:
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    kinds = {
        int: "integer",
        float: "number",
        bool: "true or false",
        str: "text",
        tuple: "integers" if option.items is int else "texts",
    }
    if surface == "cli" and option.is_file:
        return "file"
    if option.kind not in (int, float):
        return kinds.get(option.kind, "object")
    maximum = option.http_maximum if surface in ("http", "diffusion") and option.http_maximum else option.maximum
    low = (
        "" if option.minimum is None or abs(option.minimum) > 2**53 else f" {'>' if option.exclusive else '≥'} {option.minimum}"
    )
    high = "" if maximum is None or maximum > 2**53 else f", ≤ {maximum}"
    return kinds[option.kind] + low + high


def recipe_table(name: str, described: str, where: str) -> str:
    """The keys of a section: type, default, meaning."""
    section = _resolve(f"unmask.{name}", where)
    if section is None:
        return ""
    assert issubclass(section, BaseModel)
    texts = dict(line.split(": ", 1) for line in described.strip().splitlines())
    schema = section.model_json_schema()
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, value in schema["properties"].items():
        text = value.get("description") or texts.pop(key, None)
        if text is None:
            LOG.warning("%s: key %s of %s has no description, neither in its schema nor on the page", where, key, name)
        default = _yaml(value["default"]) if "default" in value else "*required*"
        lines.append(f"| `{key}` | {_kind(value)} | {default} | {text} |".replace(" || ", " \\|\\| "))
    for key in texts:
        LOG.warning("%s: %s has no key %s that needs a description", where, name, key)
    return "\n".join(lines)


def suite_table(name: str, _: str, where: str) -> str:
    """The benchmarks of a suite: metric, questions, what runs them, and the scores of the first two published models."""
    from unmask.eval.registry import load_suite
    from unmask.eval.suite import own_tasks

    suite = load_suite(name)
    head = ["benchmark", "metric", "shots", "questions", "licence", "run with", "notes", *suite.models[:2]]
    lines = [head, ["---"] * len(head)]
    for benchmark in suite.benchmarks:
        tasks = " ".join(f"`{task}`" for task in benchmark.tasks)
        runner = tasks if not tasks or benchmark.tasks[0] in own_tasks() else f"lm-eval {tasks}"
        notes = {"differs": benchmark.differs, "also" if tasks else "with": benchmark.elsewhere, "missing": benchmark.missing}
        facts = [benchmark.shots, benchmark.size, benchmark.licence]
        cells = [benchmark.name, benchmark.metric, *("" if fact is None else str(fact) for fact in facts), runner or "not run"]
        cells.append("; ".join(f"{key}: {text}" for key, text in notes.items() if text))
        lines.append([*cells, *(f"{score:.2f}" for score in benchmark.published[:2])])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return f"section `{schema['$ref'].rpartition('/')[2].removesuffix('Section').lower()}`"
    if "discriminator" in schema:
        return f"section with a `{schema['discriminator']['propertyName']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_kind(part) for part in schema["anyOf"])
    kind = schema["type"]
    if kind == "array":
        return f"list of {len(schema['prefixItems'])} numbers" if "prefixItems" in schema else "list"
    bounds = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {schema[name]:g}" for name, sign in bounds.items() if name in schema]
    return " ".join([{"object": "mapping"}.get(kind, kind), ", ".join(limits)]).strip()


def _yaml(value: Any) -> str:
    plain = {None: "null", True: "true", False: "false"}
    if isinstance(value, dict):
        return "its defaults"
    spelled = plain[value] if value is None or isinstance(value, bool) else value
    return f"`{spelled}`"


def _resolve(name: str, where: str) -> Any:
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        LOG.warning("%s: there is no %s", where, name)
        return None
