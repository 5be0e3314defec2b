"""Optimizer steps and state of engines whose parameters are the masters themselves (plain tensors or DTensors)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sharding.parameters import distribute_like, full_tensor
from .base import MOMENTS, Engine


class TorchStateEngine(Engine):
    """Shared by the single-process engine and FSDP2."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self) -> float:
        limit = self.config.train.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in self.model.parameters() if p.requires_grad], limit if limit > 0 else float("inf")
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return full_tensor(norm).item()

    def full_parameters(self) -> dict[str, Tensor]:
        return {name: full_tensor(p).float().cpu().clone() for name, p in self.trainable().items()}

    def full_moments(self) -> tuple[dict[str, Tensor], int]:
        moments, steps = {}, 0
        for name, p in self.trainable().items():
            state = self.optimizer.state.get(p, {})
            for moment in MOMENTS:
                if moment in state:
                    moments[f"{name}.{moment}"] = full_tensor(state[moment]).float().cpu().clone()
            steps = int(state.get("step", steps))
        return moments, steps

    @torch.no_grad()
    def load_state(self, parameters: dict[str, Tensor], moments: dict[str, Tensor], steps: int) -> None:
        for name, p in self.trainable().items():
            p.copy_(distribute_like(parameters[name], p))
            if moments:
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(steps)),
                    **{moment: distribute_like(moments[f"{name}.{moment}"], p) for moment in MOMENTS},
                }
