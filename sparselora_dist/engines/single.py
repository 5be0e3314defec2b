"""One process, one device."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from ..config.run import RunConfig
from .optimizers import choose_optimizer
from .ranks import Ranks
from .torch_state import TorchStateEngine


class SingleEngine(TorchStateEngine):
    """Plain PyTorch. The adapter's weights are fp32; bf16 runs under autocast."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        if ranks.world_size > 1:
            raise ValueError(
                f"engine.name 'single' is one process, but {ranks.world_size} were started: use 'zero3' or 'fsdp2'"
            )
        super().__init__(config, ranks)
        self.optim = choose_optimizer(config.train, self.device)

    def prepare(self, model: nn.Module) -> None:
        self.model = model.to(self.device)
        self.make_optimizer()

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.config.model.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)
