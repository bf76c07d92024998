"""Two hosts, as network namespaces: torchrun over both has the losses of one process; a link that is cut ends in a message."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL

import pytest
import yaml

from runs import tiny_folder, tiny_jsonl, tiny_values, train_losses
from unmask.train.recipe import parse_recipe
from unmask.train.run import run_recipe
from unmask.train.state import list_checkpoints

CAN_MAKE_HOSTS = os.geteuid() == 0 and shutil.which("ip") is not None
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CAN_MAKE_HOSTS, reason="needs root and ip")]
HOSTS = ("unmask-a", "unmask-b")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Hosts:
    """Two namespaces joined by a link, and the processes that run in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", "unmask0", "netns", HOSTS[0], "type", "veth", "peer", "name", "unmask0", "netns", HOSTS[1])
        for number, host in enumerate(HOSTS, start=1):
            ip("-n", host, "addr", "add", f"10.77.0.{number}/24", "dev", "unmask0")
            for device in ("lo", "unmask0"):
                ip("-n", host, "link", "set", device, "up")

    def start(self, recipe: Path, out: Path) -> None:
        """Start one rank on each host."""
        for number, host in enumerate(HOSTS):
            command = ["torch.distributed.run", "--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
            address = ["--master-addr", "10.77.0.1", "--master-port", "29555", "--local-addr", f"10.77.0.{number + 1}"]
            verb = ["-m", "unmask", "convert", "--recipe", str(recipe), "--out", str(out)]
            environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "unmask0"}
            line = ["ip", "netns", "exec", host, sys.executable, "-m", *command, *address, *verb]
            process = subprocess.Popen(
                line, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            self.started.append(process)

    def outputs(self) -> list[str]:
        return [process.communicate(timeout=300)[0] for process in self.started]

    def close(self) -> None:
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, SIGKILL)
            process.wait()
        for host in HOSTS:
            ip("netns", "del", host)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path)
    yield made
    made.close()


def values(folder: Path, tokens: int) -> dict[str, object]:
    tiny_folder(folder / "model")
    tiny_jsonl(folder / "data.jsonl")
    made = tiny_values(folder / "model", folder / "data.jsonl", tokens=tokens, checkpoint_every=2)
    made["parallel"] = {"timeout": 8}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made))
    return made


def test_two_hosts_have_the_losses_of_one_process(hosts: Hosts, tmp_path: Path) -> None:
    recipe = parse_recipe(values(tmp_path, 2000), "test")
    hosts.start(tmp_path / "recipe.yaml", tmp_path / "run")
    first, second = hosts.outputs()
    assert "trained " in first
    assert "trained " not in second
    run_recipe(recipe, tmp_path / "whole")
    assert train_losses(tmp_path / "run") == pytest.approx(train_losses(tmp_path / "whole"), rel=1e-4)


def test_a_link_that_is_cut_ends_in_a_message_and_a_resumable_state(hosts: Hosts, tmp_path: Path) -> None:
    values(tmp_path, 10_000_000)
    hosts.start(tmp_path / "recipe.yaml", tmp_path / "run")
    stop = time.monotonic() + 200
    while max(train_losses(tmp_path / "run"), default=0) < 4:
        assert time.monotonic() < stop
        time.sleep(0.1)
    ip("-n", HOSTS[0], "link", "set", "unmask0", "down")
    first, second = hosts.outputs()
    assert "error: rank 1 (" in first
    assert "error: no other rank can be reached" in second or "error: rank 0 (" in second
    assert list_checkpoints(tmp_path / "run")
