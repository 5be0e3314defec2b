"""Bytes on the wire between two hosts in a step, by layout, beside what ``sparselora-dist plan`` says.

    python benchmarks/wire.py --output benchmarks/results/wire.md

Two hosts (network namespaces), two ranks on each, the embedded demo model in fp32 with LoRA on all matrices. A layout runs
twice, with ``SHORT`` and with ``LONG`` steps; a step is the difference by the steps between. Counted is what the link's
device has sent, headers included (``tx_bytes``), on the host that sends more.

The plan knows what a rank receives (``plan/traffic.py``), not where from. NCCL's rings and gloo's algorithms pass data from
neighbour to neighbour, and ranks are numbered host by host: of a ring over both hosts one rank's share crosses in each
direction, however many ranks a host has; an all-reduce between replicas has a ring for each shard of a host. Gloo makes an
all-reduce of a reduce-scatter and so moves gradients twice: the plan says which bytes those are.

What is left between the plan and the wire is taken apart: one step's collectives are counted on rank 0, and what gloo
sends for each kind, by byte and by call, is measured first (``wire_rank.py``).

Needs root, for the namespaces.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The repository keeps its root off sys.path, and with it the folder of the script.
sys.path.append(str(Path(__file__).resolve().parent))

from faults import ROOT, run_file

from sparselora_dist.config import RunConfig
from sparselora_dist.engines.ranks import free_port
from sparselora_dist.plan.shapes import find_shape
from sparselora_dist.plan.storage import checkpointing, configured_scheme, tree_of
from sparselora_dist.plan.traffic import traffic
from support.networks import DEVICE, Network, two_networks

SHORT, LONG = 3, 9
HOSTS, PER_HOST = 2, 2
WORLD = HOSTS * PER_HOST
LARGE = 1e6
"""Bytes a step from which the plan must be met."""
RANK = "benchmarks/wire_rank.py"
IDEAL = {"all-gather/all": 0.75, "reduce-scatter/all": 0.75, "all-reduce/all": 1.5, "all-reduce/pair": 2.0}
"""A ring's bytes that a host sends per byte of the tensor; of pairs there is one for each rank of a host."""
# Matrices are sharded, and let go of, as they are in a large model.
_ZERO = {
    "stage": 3,
    "stage3_param_persistence_threshold": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "reduce_bucket_size": "auto",
}


@dataclass(frozen=True)
class Case:
    """A layout, and the hosts of ranks 0, 1, ..."""

    name: str
    engine: dict[str, Any]
    mapping: Sequence[int] = field(default=(0, 0, 1, 1))


def _fsdp(**options: int) -> dict[str, Any]:
    return {"name": "fsdp2", "fsdp": {"fsdp_version": 2, **options}}


def _zero3(**options: int) -> dict[str, Any]:
    return {"name": "zero3", "deepspeed": {"zero_optimization": _ZERO | options}}


IN_TURN = (0, 1, 0, 1)
CASES = (
    Case("fsdp2", _fsdp()),
    Case("fsdp2, round-robin", _fsdp(), IN_TURN),
    Case("hsdp", _fsdp(dp_shard_size=PER_HOST)),
    Case("hsdp, round-robin", _fsdp(dp_shard_size=PER_HOST), IN_TURN),
    Case("replicated", _fsdp(dp_shard_size=1)),
    Case("zero3", _zero3()),
    Case("zero3-hpz", _zero3(zero_hpz_partition_size=PER_HOST)),
    Case("zero3-hpz, round-robin", _zero3(zero_hpz_partition_size=PER_HOST), IN_TURN),
)


def started(hosts: Sequence[Network], mapping: Sequence[int], script: list[str], log: Path) -> int:
    """Bytes that the busier host sent while four ranks ran a script to its end."""
    before = [host.counter("tx_bytes") for host in hosts]
    port = str(free_port())
    processes = []
    with open(log, "wb") as out:
        for rank, host in enumerate(mapping):
            job = {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": hosts[0].address, "MASTER_PORT": port,
                   "LOCAL_RANK": str(list(mapping[:rank]).count(host)), "LOCAL_WORLD_SIZE": str(PER_HOST),
                   "GLOO_SOCKET_IFNAME": DEVICE, "SPARSELORA_NODE": f"host{host}", "OMP_NUM_THREADS": "1",
                   "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1"}  # fmt: skip
            words = [*hosts[host].words, sys.executable, *script]
            processes.append(
                subprocess.Popen(words, cwd=ROOT, env=os.environ | job, stdout=out, stderr=subprocess.STDOUT)
            )
        try:
            if any(process.wait(600) for process in processes):
                raise SystemExit(log.read_text(errors="replace")[-3000:])
        finally:
            for process in processes:
                process.kill()
    return max(host.counter("tx_bytes") - start for host, start in zip(hosts, before))


def planned(config: RunConfig) -> tuple[float, float]:
    """Bytes that a host sends in a step by the plan: over NCCL's rings, and by gloo."""
    shape = find_shape(config.model.name_or_path)
    scheme = configured_scheme(config, shape, WORLD)
    tree = tree_of(shape, config, scheme)
    moved = traffic(tree, scheme, checkpointing(config), config.train.gradient_accumulation_steps)

    def crossing(found: dict[int, float]) -> float:
        return sum(received for ranks, received in found.items() if ranks > PER_HOST)

    rings = crossing(moved.wire) + moved.across * min(scheme.shards, PER_HOST)
    return rings, rings + crossing(moved.reduced)


def counted(calls: dict[str, list[int]], sent: dict[str, list[float]]) -> tuple[int, float]:
    """Collectives of a step between the hosts, and the bytes that a host sends for them."""
    between = {kind: found for kind, found in calls.items() if not kind.endswith("/inside")}
    number = sum(count for count, _ in between.values())
    return number, sum(sent[kind][0] * size + sent[kind][1] * count for kind, (count, size) in between.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="layouts, such as hsdp")
    parser.add_argument("--output", type=Path, help="write the tables here too")
    options = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as name, two_networks() as hosts:
        folder = Path(name)
        started(hosts, CASES[0].mapping, [RANK, "probe", str(folder / "probe")], folder / "log")
        sent = json.loads((folder / "probe").read_text())
        text = ["| collective | gloo: bytes a host sends per byte of the tensor | a ring | and per call, kB |"]
        text += ["|---|---:|---:|---:|"]
        for kind, ideal in IDEAL.items():
            share, fixed = sent[kind]
            words = kind.replace("/all", f", {WORLD} ranks").replace("/pair", f", {PER_HOST} pairs")
            text.append(f"| {words} | {share:.3f} | {ideal:.3f} | {fixed / 1e3:.1f} |")
        text += ["", "| layout | a host sends, MB a step | plan, NCCL | plan, gloo | measured / plan, gloo | |"]
        text[-1] += " collectives counted | they cost | measured / that |"
        text += ["|---|---:|---:|---:|---:|---|---:|---:|---:|"]
        print("\n".join(text), flush=True)
        for number, case in enumerate(CASES):
            if options.only and case.name not in options.only:
                continue
            bytes_of = {}
            for steps in (SHORT, LONG):
                settings = {"max_steps": steps, "save_steps": None, "eval_steps": None, "heartbeat_timeout": 0}
                path = run_file(folder, case.engine["name"], f"{number}-{steps}", settings)
                run = json.loads(path.read_text())
                run["lora"] = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}
                run["sparse_lora"]["start_step"] = 0
                run["engine"] = case.engine
                path.write_text(json.dumps(run))
                words = [RANK, "count", str(folder / "calls"), "--config", str(path)]
                bytes_of[steps] = started(hosts, case.mapping, words, folder / "log")
            measured = (bytes_of[LONG] - bytes_of[SHORT]) / (LONG - SHORT)
            rings, plan = planned(RunConfig.from_file(path))
            calls, cost = counted(json.loads((folder / "calls").read_text()), sent)
            within = abs(measured / plan - 1) <= 0.1
            verdict = ("within 10 %" if within else "NO") if plan >= LARGE else "small"
            bad += verdict == "NO"
            text.append(
                f"| {case.name} | {measured / 1e6:.3f} | {rings / 1e6:.3f} | {plan / 1e6:.3f} | {measured / plan:.3f} "
                f"| {verdict} | {calls} | {cost / 1e6:.3f} | {measured / cost:.3f} |"
            )
            print(text[-1], flush=True)
    if options.output:
        words = " ".join(["python benchmarks/wire.py", *sys.argv[1:]])
        options.output.write_text(
            f"# Bytes between two hosts\n\n`{words}`\n\n" + "\n".join(text) + "\n", encoding="utf-8"
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
