"""The guides for several nodes in launch/, as they stand there but for names and sizes, on two hosts that have a network."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from support.harness import ROOT, RankError, run_ranks
from support.networks import reason_against
from support.trainer_workers import observe
from support.two_hosts import HOSTS, TwoHosts, two_hosts

from .conftest import Tiny

IDS = torch.arange(3, 19).reshape(1, 16)
STEPS = 3
SHELL = ("torchrun.sh", "deepspeed.sh", "mpirun.sh", "srun.sbatch", "srun_torchrun.sbatch")
GUIDES = (*SHELL, "kubernetes.yaml")
PER_HOST = 2
# What stands for 8 GPUs a node; each must be in one of the guides at least.
SIZES = {
    **{"--nproc-per-node 8": "--nproc-per-node 2", "--ntasks-per-node=8": "--ntasks-per-node=2"},
    **{"-n 16 -ppn 8": "-n 4 -ppn 2", "slots=8": "slots=2"},
}
JOB = {
    **{"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NODELIST": "node[1-2]", "SLURM_NNODES": "2"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    if reason := reason_against():
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def expected(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory, rows_of: Callable) -> list[float]:
    """The losses of one process."""
    folder = tmp_path_factory.mktemp("expected") / "out"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        observe(tiny.config("single", folder, train={"max_steps": STEPS, "save_steps": None}), IDS)
    return [row["loss"] for row in rows_of(folder)]


def guide(name: str) -> str:
    return (ROOT / "launch" / name).read_text(encoding="utf-8")


class Clone:
    """A folder that looks like the project's, in which the guides' names lead to the tiny model and its data."""

    def __init__(self, folder: Path, tiny: Tiny) -> None:
        self.folder, self.output = folder, folder / "shared" / "runs" / "llama-70b"
        for path in ROOT.iterdir():
            if path.name not in ("launch", "configs"):
                (folder / path.name).symlink_to(path)
        for name in ("launch", "configs"):
            (folder / name).mkdir()
        for path in (ROOT / "launch").iterdir():
            if path.is_file():
                (folder / "launch" / path.name).write_text(self.replaced(guide(path.name)), encoding="utf-8")
        for engine in ("fsdp2", "zero3"):
            train = {"max_steps": STEPS, "save_steps": 2, "per_device_train_batch_size": 1}
            config = tiny.config(
                engine, "nowhere", train=train, data={"train": "nothing.jsonl", "eval": "nothing.jsonl"}
            )
            options: dict[str, Any] = {
                "fsdp2": {"fsdp": {"fsdp_version": 2, "dp_shard_size": PER_HOST}},
                "zero3": {"deepspeed": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": PER_HOST}}},
            }[engine]
            config["engine"] |= options
            (folder / "configs" / f"llama3_70b_math_{engine}_multinode.json").write_text(json.dumps(config))
        data = folder / "shared" / "data"
        data.mkdir(parents=True)
        for name in ("train", "eval"):
            (data / f"{name}.jsonl").symlink_to(getattr(tiny, name))
        (folder / "shared" / "models").mkdir()
        (folder / "shared" / "models" / "Meta-Llama-3-70B").symlink_to(tiny.model)

    def replaced(self, text: str) -> str:
        for old, new in SIZES.items():
            text = text.replace(old, new)
        return text.replace("/shared/", f"{self.folder}/shared/").replace("llama-70b-0.llama-70b", "node1.job")

    def commands(self, name: str) -> list[tuple[str, list[str], dict[str, str]]]:
        """(host, command, variables) of what a user or the cluster starts."""
        script = f"launch/{name}"
        if name == "torchrun.sh":
            return [(host, ["bash", script], {}) for host in HOSTS]
        if name == "kubernetes.yaml":
            (container,) = job()["spec"]["template"]["spec"]["containers"]
            command = [self.replaced(word) for word in container["command"]]
            return [(host, command, {"JOB_COMPLETION_INDEX": str(i)}) for i, host in enumerate(HOSTS)]
        if name.endswith(".sbatch"):
            (tasks,) = re.findall(r"^#SBATCH --ntasks-per-node=(\d+)$", self.replaced(guide(name)), re.M)
            sizes = {"SLURM_NTASKS_PER_NODE": tasks, "SLURM_NTASKS": str(len(HOSTS) * int(tasks))}
            return [(HOSTS[0], ["bash", script], JOB | sizes)]
        return [(HOSTS[0], ["bash", script], {})]


def job() -> dict[str, Any]:
    (found,) = (part for part in yaml.safe_load_all(guide("kubernetes.yaml")) if part["kind"] == "Job")
    return found


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_trains_as_one_process_does(
    name: str, hosts: TwoHosts, tiny: Tiny, tmp_path: Path, expected: list[float], rows_of: Callable
) -> None:
    clone = Clone(tmp_path, tiny)
    started = [hosts.start(host, command, clone.folder, **env) for host, command, env in clone.commands(name)]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    except subprocess.TimeoutExpired as error:
        raise RankError(f"{name} did not end: {error.output}") from error
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        raise RankError("\n".join(text[-4000:] for text in outputs))
    assert "4 ranks on 2 host(s) by" in "".join(outputs)
    assert "cannot see" not in "".join(outputs)
    assert [row["loss"] for row in rows_of(clone.output)] == pytest.approx(expected, rel=1e-6)
    assert (clone.output / "checkpoint-2").is_dir()


def test_the_guides_say_the_same_of_the_run() -> None:
    """Model, data, folder, resuming and timeout of the one are those of all; every size is replaced by the tests."""
    runs = {name: re.search(r"--model\.name_or_path.*?ddp_timeout \d+", guide(name), re.S) for name in GUIDES}
    assert all(runs.values())
    words = {" ".join(found[0].replace("\\", " ").split()) for found in runs.values() if found}
    assert len(words) == 1 and "--train.resume auto" in words.pop()
    everything = "".join(map(guide, (*GUIDES, "hostfile")))
    assert all(old in everything for old in SIZES)
    for name in GUIDES:
        for config in re.findall(r"configs/\S+\.json", guide(name)):
            assert (ROOT / config).is_file()


def test_the_pods_find_the_first() -> None:
    parts = {part["kind"]: part for part in yaml.safe_load_all(guide("kubernetes.yaml"))}
    service, spec = parts["Service"], parts["Job"]["spec"]
    name = service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 2
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": parts["Job"]["metadata"]["name"]}
    assert spec["template"]["spec"]["subdomain"] == name
    assert f"--rdzv-endpoint {parts['Job']['metadata']['name']}-0.{name}:" in guide("kubernetes.yaml")


def test_a_folder_of_each_hosts_own(tmp_path: Path) -> None:
    """Where every node has its own output folder, resuming would continue on one and start anew on the other."""
    own = [str(tmp_path / host) for host in HOSTS]
    for folder in own:
        Path(folder).mkdir()
    for rank in run_ranks("support.placed_workers:shared", 2, own, own[0]):
        assert rank["one folder"] == ("", [])
        refused, warned = rank["own folders"]
        assert f"train.output_dir {own[rank['rank']]} is not the same folder on all hosts: host1 cannot see" in refused
        assert "host0 writes there" in refused and "storage that all hosts share" in refused
        assert [("host0 alone" in line, "will not find them" in line) for line in warned] == [(True, True)] * (
            1 - rank["rank"]
        )
    assert not [path for folder in own for path in Path(folder).iterdir()]
