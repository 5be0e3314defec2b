"""The schedule in the Hugging Face Trainer, and kept masks in its checkpoints."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..apply import apply_sparselora, find_state
from ..config.sparse import SparseLoRAConfig
from ..layers.context import SparseContext
from ..layers.ffn import SparseFFN
from ..sync.everyone import everyone
from .objectives import begin_objective, check_reference

_ALL = "all"
"""In the place of a rank, where every rank keeps the same masks."""


class SparseLoRACallback(TrainerCallback, ExportableState):
    """``Trainer(..., callbacks=[SparseLoRACallback()])``: drives ``start_step``/``end_step`` and checks each step.

    Logs ``sparsity/active`` (whether the step's forwards were sparse) and ``sparsity/context_share`` with the Trainer's
    own metrics. Masks that are being kept (``interval`` > 1) are in the Trainer's checkpoints, in
    ``trainer_state.json``, and a run that resumes goes on with them.

    Args:
        config: where a program builds model and Trainer itself and takes callbacks only: :func:`apply_sparselora` is called
            on its model when the Trainer is there, before training begins.
    """

    def __init__(self, config: SparseLoRAConfig | None = None) -> None:
        self._config = config
        self.held: dict[str, dict[str, str]] = {}
        """What a checkpoint keeps: rank (or ``all``) -> ``layer.group.step`` -> channels, parted by spaces."""
        self._saved_context: SparseContext | None = None

    def state(self) -> dict[str, Any]:
        """For ``trainer_state.json``; the Trainer asks the rank that writes it."""
        context = self._saved_context
        if context is not None and (context.sync.mode == "global" or _ranks() == 1):
            self.held = {_ALL: _written(context)}
        return {"args": {}, "attributes": {"held": self.held}}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._config is not None and find_state(kwargs["model"]) is None:
            apply_sparselora(kwargs["model"], self._config)
        found = find_state(kwargs["model"])
        if found is not None:  # Sooner than training begins: a reference is about to be computed.
            check_reference(args, found.context)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        context = self._context(kwargs["model"])
        _check_not_replaced(kwargs["model"])
        begin_objective(args, context)
        # DeepSpeed steps inside backward, before on_pre_optimizer_step: there the masks are compared after each forward.
        # Under accelerate launch the Trainer has the plugin alone.
        context.check_masks = "each" if args.deepspeed or args.deepspeed_plugin else "caller"
        self._saved_context = context
        found: Any = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        found = found[0] if isinstance(found, list) else found or {}
        held = found.get("attributes", {}).get("held", {})
        # Of masks that each rank chose alone, those of another number of ranks are nobody's.
        mine = str(dist.get_rank()) if _ALL not in held and len(held) == _ranks() > 1 else _ALL
        device = next(kwargs["model"].parameters()).device
        context.held.load_state_dict({name: _read(mask).to(device) for name, mask in held.get(mine, {}).items()})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        context = self._context(kwargs["model"])
        context.check_masks = "next"
        context.sharing.reset()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._context(kwargs["model"]).set_step(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        context = self._context(kwargs["model"])
        if control.should_save and context.held.interval > 1 and context.sync.mode != "global" and _ranks() > 1:
            self.held = {str(rank): masks for rank, masks in enumerate(everyone(_written(context)))}

    on_epoch_end = on_step_end

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # No step is taken on masks that the ranks did not agree on.
        self._context(kwargs["model"]).sync.check()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        context = self._context(kwargs["model"])
        counts = context.counts
        total = counts.dense + counts.context
        values = {
            "sparsity/active": float(context.was_sparse),
            "sparsity/context_share": counts.context / total if total else 0.0,
        }
        logs.update(values)
        # The Trainer has copied the row into its history before it calls this.
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1].update(values)

    @staticmethod
    def _context(model: nn.Module) -> Any:
        found = find_state(model)
        if found is None:
            raise ValueError("SparseLoRACallback needs a model that apply_sparselora was called on")
        return found.context


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _written(context: SparseContext) -> dict[str, str]:
    return {name: " ".join(map(str, mask.tolist())) for name, mask in context.held.state_dict().items()}


def _read(mask: str) -> torch.Tensor:
    return torch.tensor([int(channel) for channel in mask.split()], dtype=torch.int64)


def _check_not_replaced(model: nn.Module) -> None:
    """The Trainer applies Liger when training begins, after :func:`apply_sparselora` and before the callbacks.

    Raises:
        ValueError: a sparse FFN's ``forward`` was replaced, so that it would be computed densely.
    """
    for name, module in model.named_modules():
        if isinstance(module, SparseFFN) and "forward" in module.__dict__:
            raise ValueError(
                f"the forward of {name} was replaced, as use_liger_kernel=True does, which makes it dense: pass "
                'liger_kernel_config={"swiglu": False}'
            )
