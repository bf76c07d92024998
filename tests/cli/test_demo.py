"""`unmask demo` with tiny models in place of the embedded ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runs import tiny_folder
from unmask.cli import demo_conversion
from unmask.cli.demo import MARK, QUESTIONS
from unmask.cli.demo_comparison import verdict
from unmask.cli.demo_conversion import PROMPTS, plan_conversion, terminal_plot
from unmask.errors import CheckpointError
from unmask.models.weights.hub import EMBEDDED, EMBEDDED_DIFFUSION


@pytest.fixture(scope="module")
def speculative_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusion model inside an autoregressive one."""
    folder = tmp_path_factory.mktemp("models") / "speculative"
    return tiny_folder(folder, mask_id=3, block_size=4, start_id=0, gated_lora_rank=2)


@pytest.fixture(autouse=True)
def tiny_models(ar_folder: Path, speculative_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unmask.cli import demo

    assert (demo.AUTOREGRESSIVE_MODEL, demo.DIFFUSION_MODEL) == (EMBEDDED, EMBEDDED_DIFFUSION)
    monkeypatch.setattr(demo, "AUTOREGRESSIVE_MODEL", str(ar_folder))
    monkeypatch.setattr(demo, "DIFFUSION_MODEL", str(speculative_folder))


@pytest.fixture
def without_diffusion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.cli.demo.DIFFUSION_MODEL", "no-such-model")


def test_whole_demo(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(demo_conversion, "_tokens_per_second", lambda recipe: 200.0)
    out = tmp_path / "demo"
    result = run("demo", "--minutes", 0.1, "--out", out)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout[result.stdout.index("Side by side") :]
    for question in QUESTIONS:
        assert f"> {question}" in result.stdout
    assert result.stdout.count("the same text") == len(QUESTIONS)
    assert result.stdout.count("tokens per forward") == len(QUESTIONS)
    assert f"Of {len(QUESTIONS)} prompts, speculative decoding was" in result.stdout
    assert f"plot     {out / 'conversion' / 'loss.png'}" in result.stdout
    assert (out / "conversion" / "loss.png").exists()
    assert "┤" in result.stdout, "the terminal plot"
    model = Path(next(line for line in result.stdout.splitlines() if line.startswith("model ")).removeprefix("model").strip())
    assert run("generate", "Hello", "-m", model, "--max-new-tokens", 4).exit_code == 0
    written = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in written] == [prompt for prompt in PROMPTS if prompt in {w["prompt"] for w in written}]


def test_skip_conversion_writes_nothing(run, tmp_path: Path) -> None:
    result = run("demo", "--skip-conversion", "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "demo").exists()


def test_without_the_diffusion_model_the_rest_runs_and_the_end_is_1(
    run, tmp_path: Path, without_diffusion, monkeypatch
) -> None:
    monkeypatch.setattr(demo_conversion, "_tokens_per_second", lambda recipe: 1.0)
    result = run("demo", "--minutes", 0.1, "--out", tmp_path / "demo")
    assert result.exit_code == 1
    assert "Continuing without diffusion answers: 'no-such-model'" in result.stdout
    assert (tmp_path / "demo" / "conversion" / "loss.png").exists()
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_without_the_autoregressive_model_there_is_no_demo(fails, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("unmask.cli.demo.AUTOREGRESSIVE_MODEL", "no-such-model")
    assert "no-such-model" in fails("demo", "--out", tmp_path / "demo")


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ((2.1, 1.05), "faster on 2 (2.10, 1.05 times the tokens/s), compared"),
        ((2.1, 0.9), "faster on 1 (2.10 times the tokens/s), slower on 1 (0.90 times the tokens/s), compared"),
        ((0.9, 0.804), "slower on 2 (0.90, 0.80 times the tokens/s), compared"),
        ((1.02, 0.98), "as fast on 2 (1.02, 0.98 times the tokens/s), compared"),
    ],
)
def test_verdict_holds_on_every_prompt(ratios: tuple[float, ...], said: str) -> None:
    assert verdict(ratios).startswith(f"Of 2 prompts, speculative decoding was {said}")


@pytest.mark.parametrize("minutes", [0, -1, "nan", "inf"])
def test_bad_minutes(fails, tmp_path: Path, minutes: object) -> None:
    assert "--minutes" in fails("demo", "--minutes", minutes, "--out", tmp_path / "demo")


def test_a_folder_of_somebody_else_is_left_alone(fails, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    fails("demo", "--out", tmp_path, names=[tmp_path])
    fails("demo", "--out", tmp_path / "mine.txt", names=["mine.txt"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_of_an_earlier_demo_is_replaced(run, tmp_path: Path, without_diffusion, monkeypatch) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    (out / MARK).write_text("")
    (out / "old").write_text("")

    def stop(*arguments: object) -> None:
        raise CheckpointError("far enough")

    monkeypatch.setattr(demo_conversion, "plan_conversion", stop)
    assert run("demo", "--out", out).exit_code == 2
    assert sorted(path.name for path in out.iterdir()) == [MARK, "answers.jsonl"]


def test_plan_fits_the_machine(ar_folder: Path, answers: Path) -> None:
    recipe = plan_conversion(str(ar_folder), answers, 0.5)
    again = plan_conversion(str(ar_folder), answers, 500)
    assert 0 < recipe.train.tokens < again.train.tokens
    assert [phase.block_size for phase in recipe.blocks.phases] == [4, 8, 32]
    assert recipe.model == str(ar_folder)


def test_conversion_stops_at_the_deadline(run, tmp_path: Path, monkeypatch) -> None:
    """A plan far beyond the time ends in time, with a model to show for it."""
    monkeypatch.setattr(demo_conversion, "_tokens_per_second", lambda recipe: 1e6)
    result = run("demo", "--minutes", 0.02, "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    folder = next(line for line in result.stdout.splitlines() if line.startswith("model ")).split()[1]
    assert folder.endswith("/model")
    assert (Path(folder) / "config.json").exists()


@pytest.mark.parametrize("count", [0, 1])
def test_no_plot_of_too_little(tmp_path: Path, count: int) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"kind": "train", "step": 1, "tokens": 5, "loss": 2.0}\n' * count)
    assert terminal_plot(metrics, 60) == ""


def test_terminal_plot_fits_its_width(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    records = [{"kind": "train", "step": i, "tokens": 100 * i, "loss": 9.0 / i} for i in range(1, 50)]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = terminal_plot(metrics, 60).splitlines()
    assert len(lines) == 15
    assert {len(line) for line in lines} == {60}
    assert "\x1b" not in "".join(lines)
