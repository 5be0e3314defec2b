"""PyTorch FSDP2: every marked module is a unit, with its frozen weights, factors and adapters.

A decoder layer is gathered for its forward and again for its backward. So would be the embedding and the LM head, the
largest matrices of a small model (2.1 GB at 8B in bf16), if they were the root's; as units of their own they are gathered
once where backward does not read them: a frozen embedding passes no gradient on, and the loss in chunks has made the
head's already (:mod:`sparselora_dist.layers.logits` says so, forward by forward). What is left to the root, the last
norm, is resharded like everything else, so that nothing is whole between forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion

from ..config.run import RunConfig
from ..sharding.placement import Placement, RowShards, take_rows, waiting_rows
from ..sharding.units import read_in_backward, shard_units
from .hosts import check_groups
from .optimizers import choose_optimizer
from .ranks import Ranks, start_distributed
from .torch_state import TorchStateEngine

_DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


class FSDP2Engine(TorchStateEngine):
    """``fully_shard`` with Accelerate's option names."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        self.ranks, self.heartbeat = start_distributed(ranks, config.train.ddp_timeout, config.train.heartbeat_timeout)
        self.options: dict[str, Any] = config.engine.fsdp_options()
        home = torch.device("cpu") if self.options.get("fsdp_offload_params", False) else self.device
        self.optim = choose_optimizer(config.train, home)
        replicas, shards = config.engine.fsdp_mesh(ranks.world_size)
        check_groups(self.ranks.hosts, shards, "engine.fsdp.dp_shard_size")
        shape, names = ((replicas, shards), ("replicate", "shard")) if replicas > 1 else ((shards,), ("shard",))
        self._mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    def placement(self) -> Placement:
        if self.config.quantization.stored and TorchVersion(torch.__version__) < "2.12":
            raise ValueError(
                f"engine.name 'fsdp2' with 'quantization' needs torch 2.12 (this is {torch.__version__}, which "
                "cannot shard uint8 parameters): use engine.name 'zero3', or a newer torch"
            )
        shards = self._mesh["shard"]
        home = torch.device("cpu") if self.options.get("fsdp_offload_params", False) else self.device
        return RowShards(self.device, shards.get_local_rank(), shards.size(), shards.get_group(), home)

    def prepare(self, model: nn.Module) -> None:
        offload = self.options.get("fsdp_offload_params", False)
        settings: dict[str, Any] = {
            "mesh": self._mesh,
            "reshard_after_forward": self.options.get("fsdp_reshard_after_forward", True),
            "mp_policy": self._precision(),
            "offload_policy": CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if offload else OffloadPolicy(),
        }
        # Layer by layer: what is whole moves to the device and leaves as a shard before the next layer moves.
        for unit in (*shard_units(model), [model]):
            waiting = _waiting(unit)
            fully_shard(unit if len(unit) > 1 else unit[0], **settings)
            _fill(waiting)
            if all(isinstance(module, nn.Embedding) for module in unit) and not _trains(unit):
                read_in_backward(unit[0], False)
        self.model = model
        self.make_optimizer()

    def _precision(self) -> MixedPrecisionPolicy:
        policy = self.options.get("fsdp_mixed_precision_policy")
        if isinstance(policy, dict):
            if self.config.train.gradient_checkpointing and policy.get("output_dtype", None) is not None:
                raise ValueError(
                    "engine.fsdp.fsdp_mixed_precision_policy.output_dtype with train.gradient_checkpointing: the cast moves "
                    "each layer's input, by which its masks are found again in recomputation. Remove output_dtype"
                )
            return MixedPrecisionPolicy(**{key: _DTYPES.get(value, value) for key, value in policy.items()})
        if policy is None and self.config.model.dtype == "float32":
            return MixedPrecisionPolicy()
        # The adapter's masters stay fp32 in the shards; they are gathered, and compute, in this dtype.
        return MixedPrecisionPolicy(param_dtype=_DTYPES[policy or "bf16"], reduce_dtype=torch.float32)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # Gradients of all but the last micro-batch stay unreduced: one reduce-scatter per step.
        self.model.set_requires_gradient_sync(last)
        loss.backward()


def _trains(unit: list[nn.Module]) -> bool:
    return any(p.requires_grad for module in unit for p in module.parameters())


def _waiting(unit: list[nn.Module]) -> list[tuple[nn.Module, str, Tensor]]:
    """(module, name, rows of this rank) of the parameters that have no values yet."""
    waiting = [
        (module, name, parameter)
        for outer in unit
        for module in outer.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if waiting_rows(parameter) is not None
    ]
    # Tied weights are one parameter.
    rows = {key: take_rows(parameter) for key, parameter in {id(entry[2]): entry[2] for entry in waiting}.items()}
    return [(module, name, rows[id(parameter)]) for module, name, parameter in waiting]


def _fill(waiting: list[tuple[nn.Module, str, Tensor]]) -> None:
    """Give the sharded parameters that took their places the rows."""
    made: dict[int, nn.Parameter] = {}
    for module, name, rows in waiting:
        empty: Any = getattr(module, name)
        if id(empty) not in made:  # Tied weights are one parameter.
            # Not from_local, which would move the rows of an offloaded parameter to the mesh's device.
            shard = DTensor(rows, empty._spec, requires_grad=False)
            made[id(empty)] = nn.Parameter(shard, requires_grad=False)
        module.register_parameter(name, made[id(empty)])
