"""The launcher of ranks: results, errors of users, ranks that are lost, `--nproc`, and torchrun. A start takes seconds each."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import refused
from runs import tiny_folder, tiny_jsonl, tiny_values, train_losses
from unmask.errors import DataError, TrainingError
from unmask.train.metrics import read_metrics
from unmask.train.parallel.launch import Launcher
from unmask.train.recipe import parse_recipe
from unmask.train.run import run_recipe
from unmask.train.state import list_checkpoints

pytestmark = pytest.mark.slow


def sum_of_ranks(should_stop: Callable[[], bool], offset: int) -> int:
    print("hello")
    return offset + int(os.environ["RANK"]) + int(should_stop())


def bad_data(should_stop: Callable[[], bool], starts: Path) -> None:
    with starts.open("a") as file:
        file.write("x")
    raise DataError("data.jsonl is empty")


def fails(should_stop: Callable[[], bool], error: Exception, starts: Path) -> None:
    with starts.open("a") as file:
        file.write("x")
    raise error


def dies_once(should_stop: Callable[[], bool], deaths: int) -> str:
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if os.environ["RANK"] == "1" and int(attempt) < deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return attempt


def test_the_first_rank_answers_and_the_others_log(tmp_path: Path) -> None:
    assert Launcher(2, max_restarts=0, logs=tmp_path).run(sum_of_ranks, 5) == 5
    (log,) = tmp_path.rglob("1/stdout.log")
    assert log.read_text() == "hello\n"


def test_an_error_of_the_user_is_raised_and_nothing_started_again(tmp_path: Path) -> None:
    with refused(DataError, "data.jsonl"):
        Launcher(2, max_restarts=3, logs=tmp_path).run(bad_data, tmp_path / "starts")
    assert (tmp_path / "starts").read_text() in ("x", "xx")


def test_a_full_disk_is_one_line_and_nothing_started_again(tmp_path: Path) -> None:
    with refused(TrainingError, "space"):
        Launcher(2, max_restarts=3, logs=tmp_path).run(fails, OSError(errno.ENOSPC, "No space left"), tmp_path / "starts")
    assert (tmp_path / "starts").read_text() in ("x", "xx")


def test_lost_ranks_are_started_again_so_many_times(tmp_path: Path) -> None:
    assert Launcher(2, max_restarts=1, logs=tmp_path).run(dies_once, 1) == "1"
    with refused(TrainingError, "rank 1"):
        Launcher(2, max_restarts=1, logs=tmp_path).run(dies_once, 2)


def is_rank(command: bytes) -> bool:
    """Whether the command line is that of a rank, of `--nproc` or of torchrun."""
    return b"spawn_main" in command or b"convert" in command


def values_in(folder: Path, family: str, tokens: int) -> dict[str, Any]:
    """The values of a recipe whose model and data are made in `folder`."""
    model, data = tiny_folder(folder / "model", family=family), tiny_jsonl(folder / "data.jsonl")
    return tiny_values(model, data, tokens=tokens, checkpoint_every=2)


@cache
def whole_losses(family: str, tokens: int) -> dict[int, float]:
    """Losses of the run in this process; they do not depend on the folder."""
    with tempfile.TemporaryDirectory() as folder:
        run_recipe(parse_recipe(values_in(Path(folder), family, tokens), "test"), Path(folder) / "run")
        return train_losses(Path(folder) / "run")


class Run:
    """A run of `unmask convert` in two processes."""

    def __init__(self, folder: Path, tokens: int = 20_000, family: str = "llama") -> None:
        values = values_in(folder, family, tokens)
        values["parallel"] = {"timeout": 10}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        self.out, self._whole = folder / "run", (family, tokens)
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *command: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Start the command in a group of its own."""
        arguments = ["convert", "--recipe", str(self.out.parent / "recipe.yaml"), "--out", str(self.out), *options]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", *(command or ("unmask",)), *arguments]
        process = subprocess.Popen(
            line, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._started.append(process)
        return process

    def end(self) -> None:
        """Kill what still runs."""
        for process in self._started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait_for_step(self, step: int) -> None:
        stop = time.monotonic() + 200
        while not any(record["step"] >= step for record in read_metrics(self.out / "metrics.jsonl")):
            assert time.monotonic() < stop, f"step {step} was not reached"
            time.sleep(0.05)

    def wait_for_save(self) -> Path:
        """Wait until a save begins: the checkpoint that it will be."""
        folder, stop = self.out / "checkpoints", time.monotonic() + 200
        before = set(folder.glob(".*.partial"))
        while not (begun := set(folder.glob(".*.partial")) - before):
            assert time.monotonic() < stop, "no checkpoint was saved"
        return folder / begun.pop().name.strip(".").removesuffix(".partial")

    def interrupted_by(self, number: signal.Signals) -> str:
        """Start two ranks and, after three steps, signal every process: what they print; the run ends as an interrupted one."""
        process = self.start(options=("--nproc", "2"))
        self.wait_for_step(3)
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 130, output
        return output

    def ranks(self, process: subprocess.Popen[str]) -> list[int]:
        """Process ids of the ranks, in order."""
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [int(pid) for pid in children if is_rank(Path(f"/proc/{pid}/cmdline").read_bytes())]

    def assert_same_losses(self) -> None:
        assert train_losses(self.out) == pytest.approx(whole_losses(*self._whole), rel=1e-4)


@pytest.fixture
def convert(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    run.end()


def test_sigkill_of_a_rank_costs_no_step(convert: Run) -> None:
    process = convert.start(options=("--nproc", "2"))
    convert.wait_for_step(4)
    os.kill(convert.ranks(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "a process was lost" in output
    convert.assert_same_losses()


def test_ctrl_c_saves_and_another_layout_goes_on(convert: Run) -> None:
    output = convert.interrupted_by(signal.SIGINT)
    assert "--resume --nproc 2" in output
    assert list_checkpoints(convert.out)
    process = convert.start(options=("--nproc", "4", "--resume", "--set", "parallel.data_replicate=2"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    convert.assert_same_losses()


@pytest.mark.parametrize(("family", "divided"), [("llama", "tensor"), ("llada2", "expert")])
def test_killed_runs_end_with_the_losses_of_one_process_on_another_layout(tmp_path: Path, family: str, divided: str) -> None:
    convert, two = Run(tmp_path, family=family), ("--nproc", "2", "--max-restarts", "0", "--resume")
    try:
        # A rank in a step.
        process = convert.start(options=two)
        convert.wait_for_step(3)
        os.kill(convert.ranks(process)[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 1, output
        # The launcher: its ranks save, and end.
        process = convert.start(options=two)
        convert.wait_for_step(6)
        process.kill()
        process.communicate(timeout=60)
        last = max(train_losses(convert.out))
        assert list_checkpoints(convert.out)[-1].name == f"step-{last:07d}"
        # A rank in a save, which leaves the checkpoint before it.
        process = convert.start(options=two)
        begun = convert.wait_for_save()
        os.kill(convert.ranks(process)[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 1, output
        assert list_checkpoints(convert.out)[-1].name < begun.name
        process = convert.start(options=("--nproc", "4", "--resume", "--set", f"parallel.{divided}=2"))
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        convert.assert_same_losses()
    finally:
        convert.end()


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path, tokens=100_000_000)
    yield run
    run.end()


def test_sigterm_to_every_process_saves(endless: Run) -> None:
    output = endless.interrupted_by(signal.SIGTERM)
    assert "saved" in output
    assert "process was lost" not in output
    assert list_checkpoints(endless.out)


def test_a_rank_that_hangs_is_named(endless: Run) -> None:
    process = endless.start(options=("--nproc", "2", "--max-restarts", "0"))
    # The checkpoint of the second step, written in the background, is complete when the fourth's begins.
    endless.wait_for_step(5)
    hanging = endless.ranks(process)[1]
    os.kill(hanging, signal.SIGSTOP)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert f"error: rank 1 ({os.uname().nodename}, process {hanging})" in output
    assert list_checkpoints(endless.out)


def test_torchrun_starts_the_ranks_and_the_first_one_reports(convert: Run) -> None:
    command = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "unmask")
    output, _ = convert.start(*command).communicate(timeout=300)
    assert output.count("trained ") == 1
    convert.assert_same_losses()
    before = (convert.out / "metrics.jsonl").read_bytes()
    command = (*command[:2], "--max-restarts", "2", *command[2:])
    process = convert.start(*command)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert output.count("error: ") == 1
    assert "already holds a run" in output
    assert (convert.out / "metrics.jsonl").read_bytes() == before


def test_two_agents_start_their_ranks_again_together(convert: Run) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    where = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "test", "--local-addr", "localhost")
    command = ("torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2", *where, "-m", "unmask")
    agents = [convert.start(*command) for _ in range(2)]
    convert.wait_for_step(4)
    os.kill(convert.ranks(agents[1])[0], signal.SIGKILL)
    outputs = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert "a process was lost" in "".join(outputs)
    convert.assert_same_losses()
