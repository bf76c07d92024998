"""`unmask ngrams`: a table beside a model that decodes the same text from it; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

from unmask.engine.ngrams import find_ngrams
from unmask.models.weights.hub import NGRAMS


def write_texts(path: Path, count: int) -> Path:
    """Answers that repeat each other."""
    lines = [{"prompt": f"question {number}", "response": "one two three four five, one two three"} for number in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_table_beside_the_model_changes_no_text(run, ar_folder: Path, tmp_path: Path) -> None:
    data = write_texts(tmp_path / "own.jsonl", 40)
    command = ("generate", "one two three", "-m", ar_folder, "--max-new-tokens", 12, "--json")
    before = json.loads(run(*command).stdout)["text"]
    made = run("ngrams", ar_folder, "--data", data, "--data", data)
    assert made.exit_code == 0, made.output
    assert "4 documents" in made.stdout
    table = find_ngrams(str(ar_folder), ar_folder, 10**6)
    assert table is not None
    assert len(table) > 0
    assert json.loads(run(*command).stdout)["text"] == before
    (ar_folder / NGRAMS).write_bytes(b"damaged")
    result = run(*command)
    assert result.exit_code == 2
    assert NGRAMS in result.stderr
    (ar_folder / NGRAMS).unlink()


def test_a_model_made_of_it_has_the_table(run, own_folder: Path, tmp_path: Path) -> None:
    assert run("ngrams", own_folder, "--data", write_texts(tmp_path / "own.jsonl", 3)).exit_code == 0
    table = (own_folder / NGRAMS).read_bytes()
    assert run("export", own_folder, "--out", tmp_path / "exported").exit_code == 0
    assert run("quantize", own_folder, "--bits", 8, "--out", tmp_path / "int8").exit_code == 0
    for name in ("exported", "int8"):
        assert (tmp_path / name / NGRAMS).read_bytes() == table


def test_elsewhere(run, ar_folder: Path, tmp_path: Path) -> None:
    data = write_texts(tmp_path / "own.jsonl", 3)
    assert run("ngrams", ar_folder, "--data", data, "--out", tmp_path / "other").exit_code == 0
    assert (tmp_path / "other" / NGRAMS).is_file()
    assert not (ar_folder / NGRAMS).exists()


def test_a_table_is_extended(run, fails, own_folder: Path, tmp_path: Path) -> None:
    data, other = write_texts(tmp_path / "own.jsonl", 3), tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({"prompt": str(n), "response": "six seven eight nine six seven eight"}) + "\n" for n in range(3))
    )
    fails("ngrams", own_folder, "--data", data, "--extend", names=(own_folder, "--extend"))
    assert run("ngrams", own_folder, "--data", data).exit_code == 0
    before = find_ngrams(str(own_folder), own_folder, 10**6)
    assert before is not None
    assert run("ngrams", own_folder, "--data", other, "--extend").exit_code == 0
    after = find_ngrams(str(own_folder), own_folder, 10**6)
    assert after is not None
    assert set(before.keys.tolist()) < set(after.keys.tolist())


def test_what_cannot_be_counted_is_refused(fails, ar_folder: Path, diffusion_folder: Path, tmp_path: Path) -> None:
    data, empty = write_texts(tmp_path / "own.jsonl", 3), tmp_path / "empty.jsonl"
    empty.write_text("")
    fails("ngrams", diffusion_folder, "--data", data, names=(diffusion_folder, "denoising"))
    fails("ngrams", "smollm2-135m", "--data", data, names=("smollm2-135m", "--out"))
    fails("ngrams", ar_folder, "--data", tmp_path / "none.jsonl", names=("none.jsonl",))
    fails("ngrams", ar_folder, "--data", empty, names=("empty.jsonl",))
    fails("ngrams", ar_folder, "--data", write_texts(tmp_path / "one.jsonl", 1), "--out", data, names=())
