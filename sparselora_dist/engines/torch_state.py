"""Optimizer steps and state of engines whose parameters are the masters themselves (plain tensors or DTensors)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..sharding.parameters import distribute_like, full_tensor, is_dtensor
from .base import Engine
from .optimizers import EIGHT_BIT, MOMENTS, codes_of, fp32_moments, make_optimizer, restore, under


class TorchStateEngine(Engine):
    """Shared by the single-process engine and FSDP2."""

    def make_optimizer(self) -> None:
        """Over the trainable parameters; bitsandbytes knows plain tensors only and gets the shards of DTensors."""
        local = self.optim in EIGHT_BIT
        self._stepped: dict[str, nn.Parameter] = {
            name: nn.Parameter(_shard(p)) if local and is_dtensor(p) else p for name, p in self.trainable().items()
        }
        self.optimizer = make_optimizer(self.optim, self._stepped.values(), self.config.train)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def local_gradients(self) -> dict[str, Tensor]:
        gradients = {name: p.grad for name, p in self.trainable().items() if p.grad is not None}
        return {name: grad.to_local() if is_dtensor(grad) else grad for name, grad in gradients.items()}

    def full_gradients(self) -> dict[str, Tensor]:
        return {name: full_tensor(p.grad).float().cpu() for name, p in self.trainable().items() if p.grad is not None}

    def clear_gradients(self) -> None:
        for p in self.trainable().values():
            p.grad = None

    def step(self) -> float:
        limit = self.config.train.max_grad_norm
        trained = self.trainable()
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), limit if limit > 0 else float("inf"))
        for name, p in trained.items():
            _hand_over(p, self._stepped[name])
        self.optimizer.step()
        for p in (*trained.values(), *self._stepped.values()):
            p.grad = None
        return full_tensor(norm).item()

    def full_parameters(self) -> dict[str, Tensor]:
        return {name: full_tensor(p).float().cpu().clone() for name, p in self.trainable().items()}

    def full_moments(self) -> tuple[dict[str, Tensor], int]:
        trained = self.trainable()
        states = {name: self.optimizer.state.get(p, {}) for name, p in self._stepped.items()}
        # A rank may hold nothing but empty shards, which have no state, and still gathers with the others.
        steps = int(self.all_max(max((float(state.get("step", 0)) for state in states.values()), default=0.0))[0])
        moments: dict[str, Tensor] = {}
        for name, p in trained.items():
            own = self._stepped[name]
            shown = fp32_moments(states[name])
            if steps and not own.numel():
                shown = shown or {moment: torch.zeros_like(own) for moment in MOMENTS}
            for moment, value in shown.items():
                whole = full_tensor(_as_sharded(value, p))
                moments[f"{name}.{moment}"] = whole.float().cpu().clone()
        return moments, steps

    def own_codes(self) -> dict[str, Tensor]:
        states = {name: self.optimizer.state.get(p, {}) for name, p in self._stepped.items()}
        return {f"{name}.{key}": t for name, state in states.items() for key, t in codes_of(state).items()}

    @torch.no_grad()
    def load_state(
        self,
        parameters: dict[str, Tensor],
        moments: dict[str, Tensor],
        steps: int,
        codes: dict[str, Tensor] | None = None,
    ) -> bool:
        exact = True
        for name, p in self.trainable().items():
            p.copy_(distribute_like(parameters[name], p))
            own = self._stepped[name]
            _hand_over(p, own)
            if f"{name}.{MOMENTS[0]}" in moments:
                wanted = {moment: distribute_like(moments[f"{name}.{moment}"], p) for moment in MOMENTS}
                if own is not p:
                    wanted = {moment: _shard(value) for moment, value in wanted.items()}
                exact &= restore(self.optimizer, own, wanted, steps, under(f"{name}.", codes or {}))
        return exact


def _shard(p: Any) -> Tensor:
    """This rank's part of a DTensor, sharing its memory."""
    return p.detach().to_local()


def _as_sharded(value: Tensor, p: Any) -> Tensor:
    """A value of a shard's shape as a DTensor like ``p``."""
    if is_dtensor(value) or not is_dtensor(p):
        return value
    from torch.distributed.tensor import DTensor

    return DTensor(value, p._spec, requires_grad=False)


def _hand_over(p: Any, own: nn.Parameter) -> None:
    """Give the shard that the optimizer steps the memory and the gradient of its parameter, where it is not the same.

    Each time, since FSDP2 moves a shard when it pads it. An empty shard has no gradient: nothing to step.
    """
    if own is p:
        return
    own.data = _shard(p)
    own.grad = _shard(p.grad) if p.grad is not None and own.numel() else None
