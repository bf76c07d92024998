"""Batches on two local nodes of Ray: answers equal to those of one process, once each, though an actor is killed."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway import free_port
from live import SlowModel, served_model
from test_batch import CONFIG, line, read, run_batch, write

from unmask.engine.llm import LanguageModel
from unmask.errors import ConfigError
from unmask.serve import batch_ray
from unmask.serve.batch_file import BatchCounts, BatchFile
from unmask.serve.batch_ray import RayOptions, run_ray_batch

COUNT = 40
HERE = Path(__file__).parent


def test_without_its_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_ray, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=r"unmask\[ray\]"):
        RayOptions(address="auto")


@pytest.mark.parametrize("values", [{"replicas": 0}, {"cpus": 0}, {"gpus": -1}])
def test_options_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        RayOptions(address="auto", **values)


@pytest.fixture(scope="module")
def cluster(ray_token: None) -> Iterator[str]:
    """The address of two nodes on this machine; in Ray's processes, its dashboard left out."""
    pytest.importorskip("ray")
    port = free_port()
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--object-store-memory=80000000"]
    start += ["--disable-usage-stats", "--block"]
    roles = ["--head", f"--port={port}", "--include-dashboard=false"], [f"--address=127.0.0.1:{port}"]
    nodes = []
    try:
        for role in roles:
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            nodes.append(subprocess.Popen([*start, *role], env=environment, start_new_session=True, **pipes))
            _wait_started(nodes[-1])
        yield f"127.0.0.1:{port}"
    finally:
        for node in nodes:
            os.killpg(node.pid, signal.SIGTERM)
        for node in nodes:
            node.wait(60)


def _wait_started(node: subprocess.Popen[str]) -> None:
    """Until Ray says that it runs."""
    assert node.stdout is not None
    told = []
    for text in node.stdout:
        told.append(text)
        if "Ray runtime started" in text:
            return
    raise AssertionError("".join(told))


def load(folder: Path, seconds: float) -> LanguageModel:
    """The same model in every process; the first waits for a second one."""
    place = folder / str(os.getpid())
    place.mkdir()
    (folder / "pids").open("a").write(f"{os.getpid()}\n")
    end = time.monotonic() + 200
    while len((folder / "pids").read_text().split()) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    return served_model(place, seconds=seconds)


@pytest.mark.slow
def test_two_nodes_answer_as_one_process_though_an_actor_is_killed(cluster: str, tiny: LanguageModel, tmp_path: Path) -> None:
    assert isinstance(tiny, SlowModel)
    requests = write(tmp_path / "requests.jsonl", [line(number) for number in range(COUNT)])
    alone, out = tmp_path / "alone.jsonl", tmp_path / "out.jsonl"
    run_batch(tiny, requests, alone, CONFIG)
    killed: list[int] = []

    def kill_one(counts: BatchCounts) -> None:
        if counts.done and not killed:
            killed.append(int((tmp_path / "pids").read_text().split()[0]))
            os.kill(killed[0], signal.SIGKILL)

    counts = run_ray_batch(
        functools.partial(load, tmp_path, 0.05),
        BatchFile.read(requests),
        out,
        CONFIG,
        RayOptions(address=cluster),
        on_progress=kill_one,
    )
    assert counts == BatchCounts(COUNT, COUNT, 0)
    pids = (tmp_path / "pids").read_text().split()
    assert killed, "nothing was killed"
    assert len(set(pids)) >= 3, "two replicas, and one more for that which was killed"
    answers = [{key: each["response"]["body"]["choices"] for key, each in read(path).items()} for path in (out, alone)]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_told(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    requests = write(tmp_path / "requests.jsonl", [line(0)])
    address = RayOptions(address=f"127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match="no cluster"):
        run_ray_batch(lambda: pytest.fail("loaded"), BatchFile.read(requests), tmp_path / "out", CONFIG, address)
