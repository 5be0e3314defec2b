"""PyTorch FSDP2: every decoder layer is a unit of its own, with its frozen weights, factors and adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from ..config.run import RunConfig
from ..families import causal_lm
from .base import Ranks, adamw, start_distributed
from .torch_state import TorchStateEngine

_DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


class FSDP2Engine(TorchStateEngine):
    """``fully_shard`` with Accelerate's option names."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        start_distributed(ranks, config.train.ddp_timeout)
        self.options: dict[str, Any] = config.engine.fsdp_options()

    def prepare(self, model: nn.Module) -> None:
        mesh = init_device_mesh(self.device.type, (self.ranks.world_size,))
        offload = self.options.get("fsdp_offload_params", False)
        settings: dict[str, Any] = {
            "mesh": mesh,
            "reshard_after_forward": self.options.get("fsdp_reshard_after_forward", True),
            "mp_policy": self._precision(),
            "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
        }
        stack: nn.ModuleList = causal_lm(model).model.layers
        for layer in stack:
            # A layer moves to the device whole and leaves as a shard before the next one moves.
            fully_shard(layer.to(self.device), **settings)
        for module in model.children() if not offload else ():
            module.to(self.device)
        fully_shard(model, **settings)
        self.model = model
        self.optimizer = adamw(model, self.config)

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
