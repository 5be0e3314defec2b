"""What the training loop asks of an engine."""

from __future__ import annotations

import contextlib
import math
import os
from abc import ABC, abstractmethod
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config.run import RunConfig
from ..sharding.placement import Placement
from ..sync.everyone import everyone
from ..sync.heartbeat import Heartbeat
from .ranks import Ranks, local_device


class Engine(ABC):
    """One way to hold the shards. Made once per run; :meth:`prepare` is called once, after the model was made sparse.

    Args:
        config: the run.
        ranks: where this process stands.
    """

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks
        self._joins = dist.is_initialized()
        """Whether the ranks were together before this engine was made, and stay so after it: several runs in a row."""
        self.heartbeat = Heartbeat()
        """Says what this rank does, and who is missing; an engine of several ranks has one that beats."""
        self.scheduler: Any = None
        """The engine's own learning rate schedule, where its configuration asks for one."""
        self.total_steps = 1
        """Length of the run; set before :meth:`prepare`. Only a DeepSpeed scheduler reads it."""
        self.device = local_device(ranks)
        if self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // ranks.local_world_size))
        self.model: nn.Module
        self.optimizer: Optimizer
        self.optim: str
        """The optimizer's name; chosen, and refused where it cannot work, when the engine is made."""

    # --- building ---------------------------------------------------------------------------------------------

    def placement(self) -> Placement:
        """Which part of the frozen weights this rank keeps; called once, before the base model is loaded."""
        return Placement(self.device)

    @abstractmethod
    def prepare(self, model: nn.Module) -> None:
        """Shard the model and make the optimizer: sets ``model`` (what forwards go through) and ``optimizer``."""

    # --- a step -------------------------------------------------------------------------------------------------

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Backward of one micro-batch; ``last`` of the optimizer step. Gradients are *averaged* over ranks."""

    @abstractmethod
    def step(self) -> float:
        """Clip, step, clear the gradients; the gradient norm before clipping."""

    @abstractmethod
    def local_gradients(self) -> dict[str, Tensor]:
        """This rank's part of the gradients that :meth:`step` takes, averaged, before clipping; by parameter."""

    @abstractmethod
    def full_gradients(self) -> dict[str, Tensor]:
        """The gradients that :meth:`step` would take, whole, in fp32 on the CPU of every rank. A collective."""

    @abstractmethod
    def clear_gradients(self) -> None:
        """Forget them: no step is taken."""

    def gradients_are_finite(self) -> bool:
        """Whether this rank's part is; waits for the device."""
        parts = [part for part in self.local_gradients().values() if part.numel()]
        return not parts or math.isfinite(torch.nn.utils.get_total_norm(parts).item())

    def nonfinite_gradients(self) -> list[str]:
        """Parameters whose gradients are not finite in this rank's part."""
        return [name for name, part in self.local_gradients().items() if not bool(part.isfinite().all())]

    def refuse_gradients(self, what: str, arose: list[str], held: list[str]) -> NoReturn:
        """A collective.

        Args:
            what: the step that is not taken.
            arose: parameters whose gradients were not finite on this rank before the ranks added theirs.
            held: those in this rank's part of the sums; said where nothing is known of the former.

        Raises:
            FloatingPointError: names parameters and ranks.
        """
        mine = arose, held
        told = everyone(mine) if dist.is_initialized() else [mine]
        known = any(first for first, _ in told)
        places = [
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} "
            f"{'on' if known else 'in the part of'} rank {rank}"
            for rank, (first, second) in enumerate(told)
            if (names := first if known else second)
        ]
        raise FloatingPointError(
            f"the gradients of {what} are not finite, though its loss is: {'; '.join(places) or 'their norm overflows'}. No "
            "step was taken. Lower train.learning_rate or train.max_grad_norm, or continue from the last checkpoint with "
            "train.resume true"
        )

    def autocast(self) -> contextlib.AbstractContextManager:
        """Around every forward."""
        return contextlib.nullcontext()

    # --- state: whole tensors on the CPU, on every rank, in fp32 ------------------------------------------------

    @abstractmethod
    def full_parameters(self) -> dict[str, Tensor]:
        """Master values of the trainable parameters by name. A collective."""

    @abstractmethod
    def full_moments(self) -> tuple[dict[str, Tensor], int]:
        """``<name>.exp_avg``, ``<name>.exp_avg_sq``, and the number of optimizer steps taken. A collective."""

    @abstractmethod
    def own_codes(self) -> dict[str, Tensor]:
        """This rank's part of an 8-bit state as it is: codes, scales and code tables, on the CPU; {} of fp32 states."""

    @abstractmethod
    def load_state(
        self,
        parameters: dict[str, Tensor],
        moments: dict[str, Tensor],
        steps: int,
        codes: dict[str, Tensor] | None = None,
    ) -> bool:
        """Put back what the methods above gave, at this engine's sharding.

        ``codes`` are those of this rank and number of ranks; those that do not fit this run are not used.

        Returns:
            Whether this rank's optimizer state is bit for bit the saved one; False where moments were coded anew in 8 bits.
        """

    # --- ranks --------------------------------------------------------------------------------------------------

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by the names that the unwrapped model gives them."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    @property
    def module(self) -> nn.Module:
        """The PEFT model itself."""
        return self.model

    @property
    def is_main(self) -> bool:
        return self.ranks.rank == 0

    def all_sum(self, *values: float) -> list[float]:
        """Sums over the ranks, in fp64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(total)
        return total.tolist()

    def all_max(self, *values: float) -> list[float]:
        """The largest over the ranks, in fp64."""
        largest = torch.tensor(values, dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()

    def close(self) -> None:
        if self._joins:
            self.heartbeat.before_end.clear()  # They hold this run.
            self.heartbeat.remedy = str
            return
        self.heartbeat.stop()
        if dist.is_initialized():
            dist.destroy_process_group()
