"""The container and the systemd unit start `unmask serve` with options it has, and agree with themselves on ports and times."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

from unmask.cli.app import app
from unmask.models.weights.hub import EMBEDDED_DIFFUSION

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()


def parsed(arguments: list[str]) -> dict[str, Any]:
    """What `unmask serve` makes of arguments; a usage error fails the test."""
    command: Any = typer.main.get_command(app)
    serve = command.commands["serve"]
    return dict(serve.make_context("serve", arguments).params)


def instruction(name: str) -> str:
    """Text of the last instruction of this name."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*)$", joined, re.MULTILINE)[-1].strip()


def start_container(tmp_path: Path, key: str | None) -> subprocess.CompletedProcess[str]:
    """Run the entry point with a program `unmask` that prints its arguments."""
    stub = tmp_path / "unmask"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"} | ({} if key is None else {"UNMASK_API_KEY": key})
    command = [*json.loads(instruction("ENTRYPOINT")), *json.loads(instruction("CMD"))]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_container_serves_with_options_that_exist(tmp_path: Path) -> None:
    ran = start_container(tmp_path, "secret")
    assert ran.returncode == 0, ran.stderr
    verb, *arguments = ran.stdout.splitlines()
    values = parsed(arguments)
    assert (verb, values["host"], values["model"], values["log_format"]) == ("serve", "0.0.0.0", EMBEDDED_DIFFUSION, "json")
    assert str(values["port"]) == instruction("EXPOSE")
    assert f"http://127.0.0.1:{values['port']}/health" in instruction("HEALTHCHECK")
    assert instruction("STOPSIGNAL") == "SIGTERM"
    assert "secret" not in ran.stdout


@pytest.mark.parametrize("key", [None, ""])
def test_the_container_does_not_start_without_a_key(tmp_path: Path, key: str | None) -> None:
    ran = start_container(tmp_path, key)
    assert ran.returncode != 0
    assert ran.stdout == ""
    assert "UNMASK_API_KEY" in ran.stderr


def test_the_container_does_not_run_as_root() -> None:
    assert int(instruction("USER")) > 0


def test_what_the_image_copies_is_there_and_enough_to_install_from() -> None:
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]]
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied) == sorted(let_in)
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [project["project"]["readme"], *project["project"]["license-files"]]
    needed += [*project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"], "hatch_build.py"]
    assert all(any(fnmatch(Path(name).parts[0], entry) for entry in copied) for name in needed)
    makefile = (ROOT / "Makefile").read_text()
    embedded = re.findall(r"^EMBEDDED_MODEL := (.*)$", makefile, re.MULTILINE)
    assert re.findall(r'^ARG EMBEDDED_MODEL="(.*)"$', DOCKERFILE, re.MULTILINE) == embedded


def test_the_unit_serves_with_options_that_exist_and_waits_for_the_answers() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "deploy/unmask.service")
    service = unit["Service"]
    program, verb, *arguments = shlex.split(service["ExecStart"])
    values = parsed(arguments)
    assert (Path(program).name, verb, values["host"], values["model"]) == ("unmask", "serve", "127.0.0.1", EMBEDDED_DIFFUSION)
    assert float(service["TimeoutStopSec"]) > values["shutdown_grace"]
    assert not service["EnvironmentFile"].startswith("-"), "without the file of the key it must not start"
    state = f"/var/lib/{service['StateDirectory']}"
    folders = dict(word.split("=", 1) for word in service["Environment"].split())
    assert folders["UNMASK_CACHE"] == state
    assert folders["HF_HOME"].startswith(f"{state}/")
    hardening = ("DynamicUser", "yes"), ("NoNewPrivileges", "yes"), ("ProtectSystem", "strict"), ("Restart", "on-failure")
    assert [(name, service[name]) for name, _ in hardening] == list(hardening)


def training_options(words: list[str]) -> dict[str, Any]:
    """What `unmask convert` makes of the words behind torchrun's `-m unmask convert`."""
    assert words[:3] == ["-m", "unmask", "convert"]
    command: Any = typer.main.get_command(app)
    return dict(command.commands["convert"].make_context("convert", words[3:]).params)


def torchrun_options(words: list[str]) -> Any:
    return get_args_parser().parse_args(words)


def test_slurm_starts_one_torchrun_per_node() -> None:
    script = (ROOT / "deploy/slurm/train.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    words = shlex.split(script.replace("\\\n", " ").rpartition("exec srun torchrun")[2].replace("$SLURM_GPUS_ON_NODE", "8"))
    split = words.index("-m")
    options = torchrun_options([*words[:split], "script"])
    assert (options.rdzv_backend, options.max_restarts, options.nproc_per_node) == ("c10d", 3, "8")
    assert training_options(words[split:])["resume"]
    assert "#SBATCH --ntasks-per-node=1" in script


def test_kubernetes_starts_one_torchrun_per_pod() -> None:
    service, job = yaml.safe_load_all((ROOT / "deploy/kubernetes/train.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    split = container["args"].index("-m")
    options = torchrun_options([*container["args"][:split], "script"])
    assert container["command"] == ["torchrun"]
    assert int(options.nnodes) == spec["completions"] == spec["parallelism"]
    assert int(options.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    name = service["metadata"]["name"]
    assert options.rdzv_endpoint == f"{job['metadata']['name']}-0.{name}:29500"
    assert pod["subdomain"] == name
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    values = training_options(container["args"][split:])
    assert values["resume"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert str(values["out"]).startswith(container["volumeMounts"][0]["mountPath"])


def kubernetes_objects(name: str) -> dict[str, Any]:
    """The objects of a manifest by their kinds."""
    return {each["kind"]: each for each in yaml.safe_load_all((ROOT / "deploy/kubernetes" / name).read_text())}


@pytest.mark.parametrize("version", ["1.31", "1.36"])
@pytest.mark.parametrize("name", ["serve.yaml", "train.yaml"])
def test_kubernetes_objects_follow_their_schemas(name: str, version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    for each in kubernetes_objects(name).values():
        validator.validate(each, version, strict=True)


def test_kubernetes_pods_serve_with_options_that_exist_and_finish_their_answers() -> None:
    objects = kubernetes_objects("serve.yaml")
    pod = objects["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    values = parsed(container["args"])
    assert values["model"] == EMBEDDED_DIFFUSION
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["spec"]["terminationGracePeriodSeconds"] >= values["shutdown_grace"] + pause + 10
    (port,) = container["ports"]
    assert port["containerPort"] == values["port"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert instruction("VOLUME").strip('["]') in {mount["mountPath"] for mount in container["volumeMounts"]}
    labels = pod["metadata"]["labels"]
    pool = kubernetes_objects("inference-pool.yaml")
    selectors = [objects["Service"]["spec"]["selector"], objects["Deployment"]["spec"]["selector"]["matchLabels"]]
    selectors += [pool["InferencePool"]["spec"]["selector"]["matchLabels"]]
    selectors += [objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]]
    assert all(selector == labels for selector in selectors)
    assert pool["InferencePool"]["spec"]["targetPorts"] == [{"number": values["port"]}]
    (rule,) = pool["HTTPRoute"]["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", pool["InferencePool"]["metadata"]["name"])
    scaled = objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert scaled["name"] == objects["Deployment"]["metadata"]["name"]
