"""A run over a link with delay and loss, against the same run over a clean one.

    python benchmarks/slow_link.py --delay 50 --loss 0.01 --engines fsdp2 zero3 --output benchmarks/results/slow_link.md

Two hosts (network namespaces), a rank on each. Not every kernel has netem, so the link is made here: a TUN device in each
namespace, and a process that carries packets (1500 bytes at most) from one to the other, each after the delay, and drops
some by a seeded draw. What TCP makes of it is the kernel's own. The model is a small one with random weights: at a round
trip of 100 ms and 1 % loss a connection carries about 0.2 MB a second.

Needs root, for the namespaces.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import multiprocessing
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# The repository keeps its root off sys.path, and with it the folder of the script.
sys.path.append(str(Path(__file__).resolve().parent))

from faults import ROOT, losses, run_file, start, wait

from support.networks import DEVICE, Network, two_networks

MTU = 1500
HEARTBEAT = 30.0
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI, _CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000


@dataclass
class Carried:
    """What passed a link, both ways together."""

    packets: Any = field(default_factory=lambda: multiprocessing.Value("q", 0))
    dropped: Any = field(default_factory=lambda: multiprocessing.Value("q", 0))
    bytes: Any = field(default_factory=lambda: multiprocessing.Value("q", 0))


def _tun(space: str) -> int:
    """A TUN device in a namespace, as a file; this process stays in that namespace."""
    with open(f"/run/netns/{space}") as handle:
        if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {space}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    return device


def _carry(spaces: Sequence[str], delay: float, loss: float, seed: int, ready: Any, carried: Carried) -> None:
    """The link itself: a process of its own, until it is ended."""
    ends = [_tun(space) for space in spaces]
    ready.set()
    draw = random.Random(seed)
    waiting: dict[int, deque[tuple[float, bytes]]] = {end: deque() for end in ends}
    while True:
        due = min((queue[0][0] for queue in waiting.values() if queue), default=None)
        now = time.monotonic()
        readable, _, _ = select.select(ends, [], [], None if due is None else max(0.0, due - now))
        now = time.monotonic()
        for end in readable:
            packet = os.read(end, MTU + 64)
            carried.packets.value += 1
            carried.bytes.value += len(packet)
            if draw.random() < loss:
                carried.dropped.value += 1
            else:
                waiting[ends[1 - ends.index(end)]].append((now + delay, packet))
        for end, queue in waiting.items():
            while queue and queue[0][0] <= now:
                os.write(end, queue.popleft()[1])


@contextmanager
def slow_link(first: str, second: str, delay: float, loss: float, seed: int, carried: Carried) -> Iterator[None]:
    """A link between two namespaces that delays (seconds, each way) and drops (a share of the packets)."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    link = context.Process(target=_carry, args=((first, second), delay, loss, seed, ready, carried), daemon=True)
    link.start()
    try:
        if not ready.wait(10):
            raise SystemExit("there is no TUN device here: /dev/net/tun")
        yield
    finally:
        link.kill()


def small_model(folder: Path) -> Path:
    """A Llama of 0.2 M parameters with random weights, and the demo's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = json.loads((ROOT / "demo/model/config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**config | {"dtype": "float32"})).save_pretrained(folder)
    for path in (ROOT / "demo/model").glob("tokenizer*"):
        shutil.copy(path, folder / path.name)
    return folder


def retransmitted(hosts: Sequence[Network]) -> int:
    """TCP segments that were sent again, on both hosts."""
    count = 0
    for host in hosts:
        text = subprocess.run([*host.words, "cat", "/proc/net/snmp"], check=True, capture_output=True, text=True).stdout
        names, values = (line.split() for line in text.splitlines() if line.startswith("Tcp:"))
        count += int(values[names.index("RetransSegs")])
    return count


def trained(config: Path, hosts: Sequence[Network]) -> float:
    """Seconds of a run on two hosts."""
    began = time.monotonic()
    processes, log = start((), config, "none all never", hosts)
    ended = wait(lambda: all(process.poll() is not None for process in processes), 1500)
    for process in processes:
        process.kill()
    if not ended or any(process.returncode for process in processes):
        raise SystemExit(f"did not finish: {log.read_text(errors='replace')[-3000:]}")
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=50.0, help="ms, each way")
    parser.add_argument("--loss", type=float, default=0.01, help="share of the packets, each way")
    parser.add_argument("--seed", type=int, default=1, help="of the losses")
    parser.add_argument("--engines", nargs="+", default=["fsdp2", "zero3"], choices=["fsdp2", "zero3"])
    parser.add_argument("--output", type=Path, help="write the table here too")
    options = parser.parse_args()
    rows = [
        "| engine | clean link, s | slow link, s | MB carried | packets | dropped | segments sent again | losses |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    print("\n".join(rows), flush=True)
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = small_model(folder / "model")
        for engine in options.engines:
            files = {}
            for kind in ("clean", "slow"):
                files[kind] = run_file(folder, engine, f"{kind}-{engine}", {"heartbeat_timeout": HEARTBEAT})
                run = json.loads(files[kind].read_text())
                run["model"]["name_or_path"] = str(model)
                run["sparse_lora"]["layers"] = {"ffn": {"1-2": 0.9}}
                files[kind].write_text(json.dumps(run))
            with two_networks() as hosts:
                clean = trained(files["clean"], hosts)
            carried = Carried()
            link = partial(slow_link, delay=options.delay / 1e3, loss=options.loss, seed=options.seed, carried=carried)
            with two_networks(link, MTU) as hosts:
                slow = trained(files["slow"], hosts)
                again = retransmitted(hosts)
            expected, got = (losses(folder / f"{kind}-{engine}") for kind in ("clean", "slow"))
            same = expected == got and bool(got)
            bad += not same
            word = f"{len(got)} equal, bit for bit" if same else "OTHERS"
            rows.append(
                f"| {engine} | {clean:.1f} | {slow:.1f} | {carried.bytes.value / 1e6:.1f} | {carried.packets.value:,} "
                f"| {carried.dropped.value:,} | {again:,} | {word} |"
            )
            print(rows[-1], flush=True)
    if options.output:
        words = " ".join(["python benchmarks/slow_link.py", *sys.argv[1:]])
        head = (
            f"# A link with {options.delay:g} ms delay and {options.loss:.0%} loss\n\n`{words}`; two hosts (network "
            f"namespaces) on one machine of {os.cpu_count()} CPU cores, a rank on each, packets of at most {MTU} bytes; "
            "delay and loss each way, by a process between two TUN devices. Seconds are of the whole run with loading, an "
            "evaluation and checkpoints.\n\n"
        )
        options.output.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
