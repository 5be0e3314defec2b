"""Bytes that a rank holds between two optimizer steps, by kind.

    weights    frozen matrices (rows, or codes), embedding, LM head, norms, biases
    scales     what decodes the codes: scales, parameters of groups, a mask of columns
    factors    estimator factors
    lora       adapter parameters; under ZeRO-3 also the gradient partitions, which it allocates once
    optimizer  Adam's two moments, in fp32 or 8 bits, and under ZeRO-3 the fp32 masters (a copy also of fp32 adapters)

FSDP2 and one process train fp32 adapters that are their own masters; their gradients exist during backward only and are
counted by :mod:`.layouts`, not here. FSDP2 cuts dim 0 into ceil(rows / N) rows, padding included. ZeRO-3 cuts the flat
tensor into ceil(elements / N), and keeps parameters up to ``stage3_param_persistence_threshold`` whole beside their part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..codecs import Codec, codec_of
from ..config import ConfigError, RunConfig
from .modules import Stored, build_tree
from .parts import Parameter, Tree
from .shapes import ModelShape
from .zero_replay import ZeroLimits
from .zero_trace import Checkpointing

EngineName = Literal["single", "zero3", "fsdp2"]
KINDS = ("weights", "scales", "factors", "lora", "optimizer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """Who holds what: an engine, the ranks, and those of its settings that change bytes."""

    engine: EngineName
    world: int
    """Ranks in all."""
    shards: int
    """Ranks among which a parameter is cut up; the others hold replicas. ZeRO-3 always shards over all."""
    secondary: int = 1
    """ZeRO-3's ``zero_hpz_partition_size``: ranks that hold a second copy of the weights among them; 1 is none."""
    reshard: bool = True
    """FSDP2: let go of a layer behind its forward."""
    gathered: torch.dtype | None = None
    """FSDP2's ``param_dtype``: what floating point parameters are gathered in; None leaves each as it is stored."""
    limits: ZeroLimits = field(default_factory=ZeroLimits)
    accumulated: torch.dtype = torch.float32
    """ZeRO-3: dtype of the gradient partitions."""
    bucket: int = 500_000_000
    """ZeRO-3: elements of the buffer that gradients are reduced in."""

    def __post_init__(self) -> None:
        if self.world < 1 or self.shards < 1 or self.world % self.shards:
            raise ConfigError(f"{self.world} ranks cannot be cut into groups of {self.shards}")
        if self.world % self.secondary:
            raise ConfigError(f"zero_hpz_partition_size {self.secondary} does not divide {self.world} ranks")

    def adapter_dtype(self, model: torch.dtype) -> torch.dtype:
        """Dtype of the LoRA parameters."""
        return model if self.engine == "zero3" else torch.float32

    def part(self, p: Parameter) -> int:
        """Elements of a parameter that a rank holds, padding included."""
        return self._part(p, self.shards)

    def _part(self, p: Parameter, ranks: int) -> int:
        if self.engine == "zero3":
            return -(-p.numel // ranks)
        return -(-p.shape[0] // ranks) * (p.numel // p.shape[0])

    def whole(self, p: Parameter) -> int:
        """Elements of a gathered parameter, padding included."""
        return self.part(p) * self.shards

    def gathered_bytes(self, p: Parameter) -> int:
        """Bytes of the output of one gather; none where nothing is cut up."""
        return self.unsharded_bytes(p) if self.shards > 1 else 0

    def unsharded_bytes(self, p: Parameter) -> int:
        """Bytes of the whole parameter as the engine hands it to the forward."""
        dtype = p.dtype
        if self.engine == "fsdp2" and self.gathered is not None and dtype.is_floating_point:
            dtype = self.gathered
        return self.whole(p) * dtype.itemsize


def engine_settings(config: RunConfig, shape: ModelShape) -> dict[str, Any]:
    """Arguments of :class:`Scheme` that the run's own engine section sets, or that its engine would fill in."""
    model: torch.dtype = getattr(torch, config.model.dtype)
    if config.engine.name == "fsdp2":
        options = config.engine.fsdp_options()
        policy = options.get("fsdp_mixed_precision_policy")
        if isinstance(policy, dict):
            policy = policy.get("param_dtype")
        elif policy is None and model is torch.bfloat16:
            policy = "bf16"
        names = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp32": torch.float32, "float32": torch.float32}
        return {
            "reshard": bool(options.get("fsdp_reshard_after_forward", True)),
            "gathered": names[policy] if policy else None,
        }
    if config.engine.name == "single":
        return {}
    ds = config.engine.deepspeed_config()
    zero = ds.get("zero_optimization", {})
    # The rules of engines/zero3.py for "auto"; a test compares the two.
    auto = {
        "stage3_param_persistence_threshold": 10 * shape.hidden,
        "stage3_prefetch_bucket_size": int(0.9 * shape.hidden**2),
        "reduce_bucket_size": shape.hidden**2,
    }

    def number(key: str, default: int) -> int:
        value = zero.get(key, default)
        return int(auto[key] if value == "auto" else value)

    accumulated = ds.get("data_types", {}).get("grad_accum_dtype")
    return {
        "limits": ZeroLimits(
            persistence=number("stage3_param_persistence_threshold", ZeroLimits().persistence),
            max_live=number("stage3_max_live_parameters", ZeroLimits().max_live),
            max_reuse=number("stage3_max_reuse_distance", ZeroLimits().max_reuse),
            prefetch=number("stage3_prefetch_bucket_size", ZeroLimits().prefetch),
        ),
        "accumulated": torch.float32 if accumulated in ("fp32", "float32") else model,
        "bucket": number("reduce_bucket_size", 500_000_000),
        "secondary": int(zero.get("zero_hpz_partition_size", 1)),
    }


def configured_scheme(config: RunConfig, shape: ModelShape, world: int, shards: int | None = None) -> Scheme:
    """The scheme that the run asks for on ``world`` ranks.

    Raises:
        ConfigError: the ranks do not fit the engine or its sizes.
    """
    name = config.engine.name
    if name == "single" and world > 1:
        raise ConfigError(f"engine.name 'single' is one process, but {world} are planned: use 'zero3' or 'fsdp2'")
    if shards is None:
        shards = config.engine.fsdp_mesh(world)[1] if name == "fsdp2" else world
    return Scheme(engine=name, world=world, shards=shards, **engine_settings(config, shape))


def checkpointing(config: RunConfig) -> Checkpointing:
    """Which recomputation the run uses."""
    if not (config.train.gradient_checkpointing or config.engine.fsdp_options().get("fsdp_activation_checkpointing")):
        return "none"
    return "reentrant" if config.train.gradient_checkpointing_kwargs.get("use_reentrant") else "non-reentrant"


def tree_of(
    shape: ModelShape, config: RunConfig, scheme: Scheme, codec: Codec | None = None, stored: Stored | None = None
) -> Tree:
    """The model's modules, as the scheme's engine trains them."""
    model: torch.dtype = getattr(torch, config.model.dtype)
    codec = codec or codec_of(config.model, config.quantization)
    return build_tree(shape, config, codec, scheme.adapter_dtype(model), stored)


def moment_bytes(elements: int, optim: str | None) -> int:
    """Of both moments of a tensor that is stepped: bitsandbytes codes 4096 elements and more, with a scale per 256."""
    if optim is None or not optim.endswith("_8bit") or elements < 4096:
        return 2 * 4 * elements
    return 2 * (elements + 4 * -(-elements // 256))


def resident(tree: Tree, scheme: Scheme, optim: str | None = None) -> dict[str, int]:
    """Bytes that a rank holds between two steps, by kind (see above), of a tree made for ``scheme``.

    ``optim`` is the run's ``train.optim``.
    """
    held, flat = dict.fromkeys(KINDS, 0), 0
    for p in tree.parameters():
        part, size = scheme.part(p), p.dtype.itemsize
        held[p.kind] += part * size
        if scheme.engine == "zero3":
            if p.numel <= scheme.limits.persistence:
                held[p.kind] += scheme.whole(p) * size if scheme.shards > 1 else 0
            # The second copy of what trains is dropped at every optimizer step.
            if scheme.secondary > 1 and not p.trainable:
                held[p.kind] += scheme.whole(p) // scheme.secondary * size
        if p.trainable:
            if scheme.engine == "zero3":
                held["lora"] += part * scheme.accumulated.itemsize
                held["optimizer"] += 4 * part
                flat += part
            else:
                held["optimizer"] += moment_bytes(part, optim)
    # ZeRO-3 steps one flat tensor a rank.
    held["optimizer"] += moment_bytes(flat, optim)
    return held


def resident_bytes(
    shape: ModelShape,
    config: RunConfig,
    world_size: int,
    shard_size: int | None = None,
    stored: Stored | None = None,
) -> dict[str, int]:
    """Bytes that a rank holds between two optimizer steps of the run, by kind, before any weight is loaded.

    Args:
        shape: of the base model.
        config: the run; its ``engine``, ``quantization``, ``sparse_lora``, ``lora`` sections and ``train.optim`` are read.
        world_size: ranks in all.
        shard_size: ranks among which a parameter is cut up; None takes it from the run (all, or FSDP2's mesh).
        stored: of a checkpoint that is quantised already, what stores each matrix.

    Returns:
        ``weights``, ``scales``, ``factors``, ``lora``, ``optimizer`` and their ``total``. Activations, gathered layers
        and logits are not in it.
    """
    scheme = configured_scheme(config, shape, world_size, shard_size)
    held = resident(tree_of(shape, config, scheme, stored=stored), scheme, config.train.optim)
    return held | {"total": sum(held.values())}
