"""GPUs that a plan can be made for.

Compute is what a fine-tuning step sustains in bf16, not the data sheet's peak: products of real shapes under a power
limit, with attention and elementwise work between them. Published LoRA steps reach 424-481 TFLOP/s of an H100's 989
(see the peers in docs/planning.md), so an H100 counts 450 and what was not measured the same 45 % of its dense bf16 peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import ConfigError

USABLE = 0.92
"""Share of a GPU's memory that may be planned: the CUDA context and the collectives' own buffers take 1-2 GB, and the
allocator's fragmentation some per cent."""


@dataclass(frozen=True, slots=True)
class GPU:
    """One kind of GPU."""

    name: str
    memory: float
    """Bytes that its driver reports as the card's memory."""
    flops: float
    """Sustained bf16 FLOP/s."""

    @property
    def usable(self) -> float:
        return USABLE * self.memory


_GiB = 1 << 30
_SUSTAINED = 0.455

GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        GPU("h100-80gb", 79.6 * _GiB, 450e12),
        # Measured (benchmarks/results/gpu.md): dense steps of 8B and 70B shapes at 8192 tokens ran at 563 to 579.
        GPU("h200-141gb", 139.8 * _GiB, 560e12),
        GPU("b200-192gb", 178 * _GiB, _SUSTAINED * 2250e12),
        GPU("a100-80gb", 79.1 * _GiB, _SUSTAINED * 312e12),
        GPU("a100-40gb", 39.4 * _GiB, _SUSTAINED * 312e12),
        GPU("l40s-48gb", 44.4 * _GiB, _SUSTAINED * 362e12),  # 48 GB with ECC on.
        GPU("rtx4090-24gb", 23.5 * _GiB, _SUSTAINED * 165e12),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """GPUs in nodes. Bandwidths are bytes per second that one GPU receives while all of a node's GPUs do."""

    gpu: GPU
    gpus: int
    per_node: int
    intra: float = 400e9
    """Inside a node (NVLink)."""
    inter: float = 50e9
    """Between nodes, each GPU's share (400 Gbit/s a GPU)."""

    def __post_init__(self) -> None:
        for name, value in (("--gpus", self.gpus), ("--gpus-per-node", self.per_node)):
            if value < 1:
                raise ConfigError(f"'{name}' is {value}: allowed: integers from 1")
        for name, speed in (("--intra-gbps", self.intra), ("--inter-gbps", self.inter)):
            if not speed > 0:
                raise ConfigError(f"'{name}' is {speed / 1e9:g}: allowed: numbers above 0 (GB/s a GPU)")
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise ConfigError(f"'--gpus' is {self.gpus}: allowed: a multiple of --gpus-per-node ({self.per_node})")

    @property
    def node(self) -> int:
        """GPUs of a node that take part."""
        return min(self.gpus, self.per_node)

    @property
    def nodes(self) -> int:
        return self.gpus // self.node

    def seconds(self, received: float, ranks: int) -> float:
        """Time that a GPU needs to receive so many bytes in a group of ``ranks`` adjacent GPUs.

        A group that reaches over nodes is as slow as the way between them.
        """
        return received / (self.intra if ranks <= self.node else self.inter)


def find_gpu(name: str) -> GPU:
    """A GPU by name.

    Raises:
        ConfigError: unknown; the message lists the known ones.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ConfigError(f"'--gpu' is '{name}': allowed: {', '.join(GPUS)}")
    return gpu
