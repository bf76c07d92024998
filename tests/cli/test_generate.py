"""`unmask generate`: text, JSON, standard input, watching, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import unmask
from helpers import example_of, params_of_calls
from unmask.cli.decoding import CONVERTED_MODEL, DIFFUSION_MODEL
from unmask.engine.sampling_params import Option, ResolvedParams, SamplingParams
from unmask.errors import UnmaskError
from unmask.models.weights.hub import EMBEDDED_CONVERTED, EMBEDDED_DIFFUSION

FIELDS = {
    "text": str,
    "prompt_tokens": int,
    "completion_tokens": int,
    "finish_reason": str,
    "forwards": int,
    "tokens_per_forward": float,
    "seconds": float,
    "tokens_per_second": float,
    "setup_seconds": float,
    "costs": dict,
}
SHORT = ("--max-new-tokens", 24, "--dtype", "float32", "--device", "cpu")


def test_text_equals_the_python_interface(run, folder: Path) -> None:
    expected = unmask.load(folder, dtype="float32").generate("Hello, how are you?", max_new_tokens=24)
    result = run("generate", "Hello, how are you?", "--model", folder, *SHORT)
    assert (result.exit_code, result.stdout, result.stderr) == (0, expected.text + "\n", "")


def test_an_adapter_is_applied(run, fails, diffusion_folder: Path, ar_folder: Path, adapter: Path, adapted) -> None:
    def ask(*arguments: object) -> str:
        result = run("generate", "Hello", "--model", diffusion_folder, *SHORT, *arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    expected = adapted.generate("Hello", max_new_tokens=24).text + "\n"
    assert ask("--lora", adapter) == expected != ask()
    fails("generate", "Hello", "--model", ar_folder, "--lora", adapter, names=[adapter, "another model"])
    fails("generate", "Hello", "--model", diffusion_folder, "--lora", "nosuch", names=["nosuch/adapter_config.json"])


def test_json_is_one_object(run, folder: Path) -> None:
    result = run("generate", "Hello", "-m", folder, "--json", *SHORT)
    assert result.exit_code == 0
    values = json.loads(result.stdout)
    assert {name: type(value) for name, value in values.items()} == FIELDS
    assert values["finish_reason"] in ("stop", "length")
    assert values["tokens_per_forward"] == values["completion_tokens"] / values["forwards"]
    assert values["tokens_per_second"] == pytest.approx(values["completion_tokens"] / values["seconds"])


def test_options_reach_the_decoder(run, diffusion_folder: Path) -> None:
    options = {"block_size": 4, "threshold": 0.2, "steps": 3, "temperature": 0.7, "top_k": 9, "top_p": 0.8, "seed": 5}
    expected = unmask.load(diffusion_folder, dtype="float32").generate("Hello", max_new_tokens=24, chat=False, **options)
    plain = unmask.load(diffusion_folder, dtype="float32").generate("Hello", max_new_tokens=24, chat=False)
    assert (expected.text, expected.forwards) != (plain.text, plain.forwards)
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    values = json.loads(run("generate", "Hello", "-m", diffusion_folder, "--raw", "--json", *SHORT, *given).stdout)
    got = (values["text"], values["prompt_tokens"], values["forwards"])
    assert got == (expected.text, expected.prompt_tokens, expected.forwards)


CLI_OPTIONS = [option for option in SamplingParams.options().values() if "cli" in option.surfaces]


@pytest.mark.parametrize("option", CLI_OPTIONS, ids=lambda option: option.name)
def test_each_option_is_passed_on(run, diffusion_folder: Path, monkeypatch, tmp_path: Path, option: Option) -> None:
    seen = params_of_calls(monkeypatch, "generate")
    text, value = example_of(option)
    (tmp_path / "file").write_text(text)
    arguments = [] if option.kind is bool else [tmp_path / "file" if option.is_file else text]
    others = ["--edit-threshold", 0.5] if option.name == "window" else []
    run("generate", "Hello", "-m", diffusion_folder, f"--{option.name.replace('_', '-')}", *arguments, *others)
    assert getattr(seen[0], option.name) == value


def test_help_groups_the_options_and_shows_their_defaults(run) -> None:
    text = " ".join(run("generate", "--help").stdout.split())
    for option in CLI_OPTIONS:
        section = text.split(f" {option.panel}: ")[1]
        assert f"--{option.name.replace('_', '-')} " in section
        assert option.shown_default == "none" or f"[default: {option.shown_default}]" in section


def test_defaults_are_the_decoders(run, diffusion_folder: Path) -> None:
    default = json.loads(run("generate", "Hello", "-m", diffusion_folder, "--json", *SHORT).stdout)
    rules = ResolvedParams()
    written = ("--threshold", rules.threshold, "--temperature", rules.temperature, "--seed", rules.seed, "--block-size", 8)
    explicit = json.loads(run("generate", "Hello", "-m", diffusion_folder, "--json", *SHORT, *written).stdout)
    assert (default["text"], default["forwards"]) == (explicit["text"], explicit["forwards"])


def test_default_models_are_the_embedded_ones() -> None:
    assert DIFFUSION_MODEL == EMBEDDED_DIFFUSION
    assert CONVERTED_MODEL == EMBEDDED_CONVERTED


def test_prompt_from_standard_input(run, folder: Path) -> None:
    named = run("generate", "Hello, how are you?", "-m", folder, "--json", *SHORT)
    piped = run("generate", "-", "-m", folder, "--json", *SHORT, input="Hello, how are you?\n")
    assert json.loads(piped.stdout)["text"] == json.loads(named.stdout)["text"]
    assert json.loads(piped.stdout)["prompt_tokens"] == json.loads(named.stdout)["prompt_tokens"]


def test_a_byte_order_mark_is_no_part_of_a_text(run, ar_folder: Path, tmp_path: Path, monkeypatch) -> None:
    asked: list[object] = []

    def record(self: object, prompt: object, params: SamplingParams, **_: object) -> None:
        asked.append((prompt, params.grammar))
        raise UnmaskError("enough")

    monkeypatch.setattr("unmask.engine.llm.LanguageModel.generate", record)
    (tmp_path / "grammar").write_text('\ufeffstart: "a"', encoding="utf-8")
    run("generate", "-", "-m", ar_folder, "--grammar", tmp_path / "grammar", input="\ufeffHello".encode())
    assert asked == [("Hello", 'start: "a"')]


def test_a_schema_may_be_written_out(run, fails, ar_folder: Path, monkeypatch, tmp_path: Path) -> None:
    seen = params_of_calls(monkeypatch, "generate")
    run("generate", "Hello", "-m", ar_folder, "--json-schema", ' {"type": "integer"}')
    assert seen[0].json_schema == ' {"type": "integer"}'
    fails("generate", "Hello", "--json-schema", tmp_path / "nosuch", names=["--json-schema", "nosuch"])


@pytest.mark.parametrize("text", ["", "\n", b"\xff\xfe"])
def test_bad_standard_input(fails, folder: Path, text: str | bytes) -> None:
    assert "standard input" in fails("generate", "-", "-m", folder, input=text)


def test_watch_without_a_terminal_prints_the_same_text(run, folder: Path) -> None:
    plain = run("generate", "Hello", "-m", folder, *SHORT)
    watched = run("generate", "Hello", "-m", folder, "--watch", *SHORT)
    assert (watched.exit_code, watched.stdout) == (0, plain.stdout)
    assert "\x1b" not in watched.stdout


def test_watch_beside_json_keeps_standard_output_clean(run, folder: Path) -> None:
    result = run("generate", "Hello", "-m", folder, "--watch", "--json", *SHORT)
    assert json.loads(result.stdout)["text"] in result.stderr


def test_markup_in_the_answer_is_printed_as_it_is(run, diffusion_folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        "unmask.data.tokenizer.Tokenizer.decode", lambda self, ids, **options: "[bold]x[/nope] <|im_end|> :cat:"
    )
    for options in ((), ("--watch",)):
        result = run("generate", "Hello", "-m", diffusion_folder, *SHORT, *options)
        assert (result.exit_code, result.stdout) == (0, "[bold]x[/nope] <|im_end|> :cat:\n")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--max-new-tokens", 0), ("--max-new-tokens", 0)),
        (("--max-new-tokens", -3), ("--max-new-tokens", -3)),
        (("--block-size", 0), ("--block-size", 0)),
        (("--block-size", -8), ("--block-size", -8)),
        (("--steps", 0), ("--steps", 0)),
        (("--threshold", 1.5), ("--threshold", 1.5)),
        (("--temperature", -1), ("--temperature", -1)),
        (("--top-k", 0), ("--top-k", 0)),
        (("--top-p", 0), ("--top-p", 0)),
        (("--dtype", "float7"), ("dtype", "'float7'")),
        (("--dtype", "int64"), ("dtype", "'int64'")),
        (("--device", "abacus"), ("device", "'abacus'")),
        (("--device", "meta"), ("device", "'meta'")),
        (("--device", "cuda:99"), ("device", "'cuda:99'")),
        (("--max-new-tokens", 1000), ("context", 256)),
    ],
)
def test_bad_options(fails, diffusion_folder: Path, options: tuple[object, ...], names: tuple[object, ...]) -> None:
    fails("generate", "Hello", "-m", diffusion_folder, *options, names=names)


def test_prompt_longer_than_the_context(fails, folder: Path) -> None:
    fails("generate", "word " * 400, "-m", folder, "--max-new-tokens", 1, names=("context", 256))


def test_unknown_model(fails) -> None:
    assert "'nope'" in fails("generate", "Hello", "-m", "nope")


def test_folder_without_config(fails, tmp_path: Path) -> None:
    assert "config.json" in fails("generate", "Hello", "-m", tmp_path)


def test_config_that_is_not_json(fails, own_folder: Path) -> None:
    (own_folder / "config.json").write_text("{")
    fails("generate", "Hello", "-m", own_folder, names=("config.json", "JSON"))


def test_unsupported_architecture(fails, own_folder: Path) -> None:
    (own_folder / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    error = fails("generate", "Hello", "-m", own_folder)
    assert "mamba" in error
    assert "qwen3" in error


def test_missing_tensor(fails, own_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(own_folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, own_folder / "model.safetensors")
    fails("generate", "Hello", "-m", own_folder, names=["model.norm.weight"])


def test_truncated_weights(fails, own_folder: Path) -> None:
    content = (own_folder / "model.safetensors").read_bytes()
    (own_folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    fails("generate", "Hello", "-m", own_folder, names=["model.safetensors"])


def test_no_tokenizer(fails, own_folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own_folder / name).unlink()
    assert "tokenizer" in fails("generate", "Hello", "-m", own_folder)


def test_damaged_tokenizer(fails, own_folder: Path) -> None:
    (own_folder / "tokenizer.json").write_text('{"model": 3}')
    assert "tokenizer" in fails("generate", "Hello", "-m", own_folder)


def test_a_schema_file_shapes_the_answer(run, folder: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}')
    for more in ((), ("--temperature", 1.0, "--seed", 3)):
        result = run("generate", "Sure?", "-m", folder, "--json-schema", schema, "--max-new-tokens", 64, *more)
        assert result.exit_code == 0, result.output
        assert isinstance(json.loads(result.stdout)["sure"], bool)


def test_an_expression_and_a_grammar_file_shape_the_answer(run, folder: Path, tmp_path: Path) -> None:
    grammar = tmp_path / "colour.lark"
    grammar.write_text('start: "red" | "green"')
    assert run("generate", "Colour?", "-m", folder, "--grammar", grammar, *SHORT).stdout.strip() in ("red", "green")
    answer = run("generate", "Number?", "-m", folder, "--regex", "[0-9]{3}-[0-9]{2}", *SHORT).stdout.strip()
    assert re.fullmatch("[0-9]{3}-[0-9]{2}", answer)


def test_bad_rules_are_one_line(fails, folder: Path, tmp_path: Path) -> None:
    assert "--json-schema" in fails("generate", "x", "-m", folder, "--json-schema", tmp_path / "none.json")
    assert "regex" in fails("generate", "x", "-m", folder, "--regex", "(")
    rules = tmp_path / "rules.lark"
    rules.write_text('start: "a"')
    fails("generate", "x", "-m", folder, "--regex", "a", "--grammar", rules, names=("--regex", "grammar"))
    assert "preset" in fails("generate", "x", "-m", folder, "--preset", "turbo")
    assert "policy" in fails("generate", "x", "-m", folder, "--policy", "luck")


def test_a_stop_string_ends_the_text_before_it(run, folder: Path) -> None:
    whole = run("generate", "Hello", "-m", folder, *SHORT).stdout.rstrip("\n")
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    stopped = json.loads(run("generate", "Hello", "-m", folder, "--json", "--stop", stop, *SHORT).stdout)
    assert (stopped["text"], stopped["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_log_probabilities_are_reported(run, folder: Path) -> None:
    values = json.loads(run("generate", "Hello", "-m", folder, "--json", "--logprobs", 2, *SHORT).stdout)
    assert len(values["logprobs"]) == values["completion_tokens"]
    for entry in values["logprobs"]:
        assert entry["logprob"] <= 0
        assert len(entry["alternatives"]) == 2
