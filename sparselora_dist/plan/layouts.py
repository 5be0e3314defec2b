"""The ways to lay a run out over a cluster: what each holds and moves, which fit, and which to choose.

A layout's name is where the shards are and how the frozen matrices are stored, ``"hsdp nf4"``:

    zero3        DeepSpeed ZeRO-3 over all GPUs
    zero3-hpz    ZeRO-3 with a second copy of the weights inside every node (``zero_hpz_partition_size``)
    fsdp2        FSDP2 over all GPUs
    hsdp         FSDP2 that shards inside a node and replicates over nodes (``dp_shard_size``)
    replicated   every GPU holds everything; only gradients are exchanged (FSDP2 with ``dp_shard_size`` 1, or one process)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..codecs import Codec, NF4Codec, PlainCodec, codec_of
from ..config import RunConfig
from .hardware import Cluster
from .modules import Stored, matrix_sizes
from .shapes import ModelShape
from .storage import Scheme, checkpointing, configured_scheme, engine_settings, resident, tree_of
from .traffic import Traffic, traffic
from .work import Batch, Work, decode_buffer, work
from .zero_replay import ZeroLimits

ORDER = ("zero3", "fsdp2", "zero3-hpz", "hsdp", "replicated")
_PLAIN = {"bfloat16": "bf16", "float32": "fp32"}
TIE = 0.05
"""Step times closer than this count as equal: both are bounds, not measurements."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One row of the plan. Bytes and FLOPs are per GPU."""

    sharding: str
    storage: str
    """``bf16``, ``fp32``, ``nf4``, or the run's own format, such as ``bcq3``."""
    matrix_bytes: int
    """Of the decoder layers' matrices as they are stored, all GPUs' shards together."""
    stored_bits: float
    """A weight of them, scales and all."""
    scheme: Scheme
    bytes: dict[str, int]
    """By kind; see docs/planning.md."""
    fits: bool
    traffic: Traffic
    work: Work
    compute: float
    """Seconds of an optimizer step."""
    communication: float
    """Seconds, if nothing of it were hidden behind compute."""

    @property
    def name(self) -> str:
        return f"{self.sharding} {self.storage}"

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    @property
    def bound(self) -> str:
        """What takes longer and so bounds the step."""
        return "communication" if self.communication > self.compute else "compute"

    @property
    def step(self) -> float:
        """Seconds of a step at least: compute and communication run side by side."""
        return max(self.compute, self.communication)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "fits": self.fits,
            "matrix_bytes": self.matrix_bytes,
            "stored_bits": self.stored_bits,
            "bytes_per_gpu": self.bytes | {"total": self.total},
            "gathered_bytes_per_step": self.traffic.gathered,
            "flops_dense_equivalent": self.work.dense_flops,
            "flops_executed": self.work.executed_flops,
            "flops_of_masks": self.work.mask_flops,
            "compute_s": self.compute,
            "communication_s": self.communication,
            "bound": self.bound,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """All layouts of a run."""

    layouts: list[Layout]
    configured: Layout | None
    """The one that the run config asks for; None for a single process on several GPUs."""
    choice: Layout | None
    """The one to take; None where nothing fits."""
    reason: str

    @property
    def refusal(self) -> str | None:
        """Why the run's own layout cannot be used, with the nearest that can; None where it can."""
        own = self.configured
        if own is None or own.fits:
            return None if self.choice else self.reason
        nearest = min((x for x in self.layouts if x.fits), key=lambda x: _distance(own, x), default=None)
        largest = max(own.bytes, key=lambda kind: own.bytes[kind])
        most = f"{_gb(own.bytes[largest])} {largest}"
        text = f"the run's layout '{own.name}' needs {_gb(own.total)} a GPU ({most}) and does not fit"
        if nearest is None:
            return f"{text}; {self.reason}"
        return f"{text}; the nearest layout that does is '{nearest.name}' with {_gb(nearest.total)}{_how(own, nearest)}"


def make_plan(
    shape: ModelShape, config: RunConfig, cluster: Cluster, batch: Batch, stored: Stored | None = None
) -> Plan:
    """Evaluate every layout for the run's model, adapter and sparsity.

    Args:
        stored: of a checkpoint that is quantised already: there is no other storage then.

    Raises:
        ConfigError: the run's engine sizes do not fit the number of GPUs; sparse layers that the model does not have.
    """
    plain = _PLAIN[config.model.dtype]
    own = _own(shape, config, cluster)
    label = config.quantization.label
    configured_name = f"{own[0]} {label or plain}" if own else None
    storages = dict.fromkeys([plain, "nf4", *([label] if label else [])])
    if stored is not None and label:
        storages = dict.fromkeys([label])
    layouts = []
    for sharding, scheme in _schemes(shape, config, cluster, own).items():
        for storage in storages:
            layouts.append(evaluate(shape, config, cluster, batch, sharding, storage, scheme, stored))
    configured = next((x for x in layouts if x.name == configured_name), None)
    choice = _choose(layouts, configured)
    return Plan(layouts, configured, choice, _reason(layouts, choice, cluster))


def evaluate(
    shape: ModelShape,
    config: RunConfig,
    cluster: Cluster,
    batch: Batch,
    sharding: str,
    storage: str,
    scheme: Scheme,
    stored_as: Stored | None = None,
) -> Layout:
    """One layout."""
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    codec = _codec(config, storage)
    tree = tree_of(shape, config, scheme, codec, stored_as)
    stored, values = matrix_sizes(tree, codec)
    moved = traffic(tree, scheme, checkpointing(config), config.train.gradient_accumulation_steps)
    done = work(shape, config, tree, batch)
    held = resident(tree, scheme, config.train.optim)
    trained = 4 * sum(scheme.part(p) for p in tree.parameters() if p.trainable)
    # fp32 gradients: of every shard from backward to step under FSDP2, made for the step under ZeRO-3.
    held["lora"] += trained
    # A masked adapter's matrix is computed into the decoded one.
    encoded = not isinstance(codec, PlainCodec)
    gather = moved.live + (decode_buffer(shape, dtype) if encoded else done.mask_elements * dtype.itemsize)
    if scheme.engine == "zero3":
        gather += scheme.bucket * dtype.itemsize
    held |= {"activations": done.activations, "gather": gather, "logits": done.logits}
    seconds = sum(cluster.seconds(size, ranks) for ranks, size in moved.wire.items())
    seconds += moved.across / (cluster.inter if cluster.nodes > 1 else cluster.intra)
    return Layout(
        sharding,
        storage,
        stored,
        8 * stored / values,
        scheme,
        held,
        sum(held.values()) <= cluster.gpu.usable,
        moved,
        done,
        done.executed_flops / cluster.gpu.flops,
        seconds,
    )


def _codec(config: RunConfig, storage: str) -> Codec:
    if storage in _PLAIN.values():
        return PlainCodec(getattr(torch, config.model.dtype))
    if storage == config.quantization.label:
        return codec_of(config.model, config.quantization)
    return NF4Codec(double_quant=config.quantization.bnb_4bit_use_double_quant)


def _own(shape: ModelShape, config: RunConfig, cluster: Cluster) -> tuple[str, Scheme] | None:
    """The sharding that the run asks for."""
    if config.engine.name == "single" and cluster.gpus > 1:
        return None
    scheme = configured_scheme(config, shape, cluster.gpus)
    if scheme.engine == "zero3":
        return ("zero3-hpz" if scheme.secondary > 1 else "zero3"), scheme
    if scheme.shards == 1:
        return "replicated", scheme
    return ("fsdp2" if scheme.shards == cluster.gpus else "hsdp"), scheme


def _schemes(
    shape: ModelShape, config: RunConfig, cluster: Cluster, own: tuple[str, Scheme] | None
) -> dict[str, Scheme]:
    """All shardings worth a row, with the run's own settings where they are its engine's."""
    gpus, node, hidden = cluster.gpus, cluster.node, shape.hidden
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    settings = engine_settings(config, shape)
    # For the engine that the run does not use: what the ready-made configs set.
    limits = ZeroLimits(persistence=10 * hidden, prefetch=int(0.9 * hidden**2))
    zero: dict[str, Any] = {"limits": limits, "accumulated": dtype, "bucket": hidden**2}
    fsdp: dict[str, Any] = {"gathered": torch.bfloat16 if dtype is torch.bfloat16 else None}
    zero |= {key: value for key, value in settings.items() if key in zero}
    fsdp |= {key: value for key, value in settings.items() if key in ("gathered", "reshard")}
    found: dict[str, Scheme] = {}
    if gpus > 1:
        found["zero3"] = Scheme(engine="zero3", world=gpus, shards=gpus, **zero)
        found["fsdp2"] = Scheme(engine="fsdp2", world=gpus, shards=gpus, **fsdp)
    if cluster.nodes > 1 and node > 1:
        found["zero3-hpz"] = replace(found["zero3"], secondary=node)
        found["hsdp"] = replace(found["fsdp2"], shards=node)
    found["replicated"] = Scheme(engine="fsdp2", world=gpus, shards=1, **fsdp)
    if own:
        found[own[0]] = own[1]
    return {name: found[name] for name in ORDER if name in found}


def _choose(layouts: Sequence[Layout], configured: Layout | None) -> Layout | None:
    """Of those that fit and are within 5 % of the fastest: unquantised first, then the run's own engine, then memory."""
    fitting = [x for x in layouts if x.fits]
    if not fitting:
        return None
    fastest = min(x.step for x in fitting)
    tied = [x for x in fitting if x.step <= (1 + TIE) * fastest]
    return min(
        tied,
        key=lambda x: (
            x.storage not in _PLAIN.values(),
            configured is not None and x is not configured,
            configured is not None and x.scheme.engine != configured.scheme.engine,
            x.total,
        ),
    )


def _reason(layouts: Sequence[Layout], choice: Layout | None, cluster: Cluster) -> str:
    gpu = cluster.gpu
    if choice is None:
        least = min(layouts, key=lambda x: x.total)
        return (
            f"no layout fits {cluster.gpus} x {gpu.name} ({_gb(gpu.usable)} usable of each): the smallest is "
            f"'{least.name}' with {_gb(least.total)}; use more GPUs or larger ones, fewer tokens, or gradient checkpointing"
        )
    text = f"take '{choice.name}': it fits with {_gb(choice.total)} of {_gb(gpu.usable)} usable a GPU"
    text += f" and is {choice.bound}-bound"
    text += f", {choice.compute:.2f} s of compute against {choice.communication:.2f} s of communication a step"
    slow = [x for x in layouts if x.bound == "communication" and x is not choice]
    if slow:
        named = ", ".join(f"{x.name} ({x.communication:.1f} s)" for x in slow)
        text += f". Communication-bound: {named}"
    lacking = [x.name for x in layouts if not x.fits]
    if lacking:
        text += f". Too large: {', '.join(lacking)}"
    plain = [x for x in layouts if x.storage in _PLAIN.values()]
    if plain and choice not in plain:
        faster = [x for x in plain if x.fits]
        why = "none without quantisation is as fast" if faster else "nothing fits without quantisation"
        text += f". {choice.storage.upper()} because {why}; decoding is not in the bound (docs/planning.md)"
    return text


def _distance(own: Layout, other: Layout) -> tuple[Any, ...]:
    """How much a run has to change: its engine, its storage, its groups; then the step's length."""
    return (
        other.scheme.engine != own.scheme.engine,
        (other.storage != own.storage) + (other.sharding != own.sharding),
        other.step,
    )


def _how(own: Layout, other: Layout) -> str:
    """The settings that lead there."""
    changes = []
    if other.scheme.engine != own.scheme.engine:
        changes.append(f'engine.name "{other.scheme.engine}"')
    if other.scheme.engine == "fsdp2" and other.scheme.shards != own.scheme.shards:
        changes.append(f"engine.fsdp.dp_shard_size {other.scheme.shards}")
    if other.scheme.engine == "zero3" and other.scheme.secondary != own.scheme.secondary:
        changes.append(f"zero_optimization.zero_hpz_partition_size {other.scheme.secondary}")
    if other.storage != own.storage:
        if "nf4" not in (own.storage, other.storage):
            changes.append("quantization.format null")  # A run's own format is no other layout's.
        else:
            changes.append(f"quantization.load_in_4bit {'true' if other.storage == 'nf4' else 'false'}")
            if own.storage not in ("nf4", *_PLAIN.values()):
                changes.append('quantization.format "nf4"')
    return f" (set {', '.join(changes)})" if changes else ""


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
