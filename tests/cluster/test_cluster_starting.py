"""The SLURM job script and the Kubernetes manifest that are shown are what these systems take."""

from __future__ import annotations

import ast
import shlex
import signal
import textwrap
from typing import Any

import pytest

from safepool.cluster.carriers import dask


def shown(after: str) -> str:
    """Return the block of the module's documentation that follows a text."""
    _, _, rest = str(dask.__doc__).partition(after)
    block = rest.partition("::\n\n")[2]
    lines = []
    for line in block.splitlines():
        if line and not line.startswith(" "):
            break
        lines.append(line)
    return textwrap.dedent("\n".join(lines)).strip()


def words_of_cluster() -> dict[str, Any]:
    """Return the arguments that the shown program gives to ``SLURMCluster``."""
    call = ast.parse(shown("On SLURM")).body[0]
    assert isinstance(call, ast.Assign)
    assert isinstance(call.value, ast.Call)
    return {str(word.arg): ast.literal_eval(word.value) for word in call.value.keywords}


def script_of(text: str) -> tuple[list[str], list[str]]:
    """Return the options for ``sbatch`` and the words of the command, without its address."""
    lines = [line for line in text.replace("\\\n", "").splitlines() if line]
    assert lines[0] == "#!/usr/bin/env bash"
    options = [line for line in lines if line.startswith("#SBATCH ")]
    (command,) = lines[1 + len(options) :]
    python, *words = shlex.split(command)
    assert python.rpartition("/")[2].startswith("python")
    return options, [word for word in words if not word.startswith("tcp://")]


def test_the_job_script_asks_for_the_cpus_that_the_node_is_to_have() -> None:
    words = words_of_cluster()
    options, command = script_of(shown("print(cluster.job_script())"))
    asked = dict(option.removeprefix("#SBATCH ").replace("=", " ").split() for option in options)
    assert asked["-n"] == "1"
    assert asked["--cpus-per-task"] == str(words["cores"] // words["processes"])
    assert asked["-t"] == words["walltime"]
    assert command[:2] == ["-m", "distributed.cli.dask_worker"]


@pytest.mark.slow  # where Dask is installed
def test_dask_jobqueue_submits_that_script() -> None:
    """Not submitted: there is no SLURM."""
    before = signal.getsignal(signal.SIGINT)
    slurm = pytest.importorskip("dask_jobqueue.slurm", reason="pip install dask-jobqueue")
    signal.signal(signal.SIGINT, before)  # the import has set one of its own
    job = slurm.SLURMJob(scheduler="tcp://a:1", name="dummy-name", **words_of_cluster())
    assert script_of(job.job_script()) == script_of(shown("print(cluster.job_script())"))


@pytest.mark.slow  # where Dask is installed
def test_the_manifest_is_one_scheduler_and_workers_that_find_it() -> None:
    yaml = pytest.importorskip("yaml", reason="pip install 'safepool[dask]'")
    service, scheduler, worker = yaml.safe_load_all(shown("On Kubernetes"))
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    containers = {}
    for kind, each in (("scheduler", scheduler), ("worker", worker)):
        assert (each["apiVersion"], each["kind"]) == ("apps/v1", "Deployment")
        template = each["spec"]["template"]
        assert each["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
        (container,) = template["spec"]["containers"]
        assert all(isinstance(word, str) for word in container["command"])
        assert container["command"][:2] == ["dask", kind]
        containers[kind] = container
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    labels = scheduler["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels
    assert containers["scheduler"]["ports"] == [{"containerPort": port}]
    assert containers["scheduler"]["command"][-1] == str(port)
    assert containers["worker"]["command"][2] == f"tcp://{name}:{port}"
    assert f'Client("tcp://{name}:{port}")' in str(dask.__doc__)
    assert worker["spec"]["replicas"] > 1
    # Quantities of Kubernetes: text, so that no reader rounds them.
    limits = containers["worker"]["resources"]["limits"]
    assert {*limits} == {"cpu", "memory"}
    assert int(limits["cpu"]) == words_of_cluster()["cores"]
