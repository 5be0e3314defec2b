"""The schedule in the Hugging Face Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..apply import find_state
from ..layers.ffn import SparseFFN


class SparseLoRACallback(TrainerCallback):
    """``Trainer(..., callbacks=[SparseLoRACallback()])``: drives ``start_step``/``end_step`` and checks each step.

    Logs ``sparsity/active`` and ``sparsity/context_share`` with the Trainer's own metrics.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        context = self._context(kwargs["model"])
        _check_not_replaced(kwargs["model"])
        # DeepSpeed steps inside backward, before on_pre_optimizer_step: there the masks are compared after each forward.
        # Under accelerate launch the Trainer has the plugin alone.
        context.check_masks = "each" if args.deepspeed or args.deepspeed_plugin else "caller"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._context(kwargs["model"]).check_masks = "next"

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._context(kwargs["model"]).set_step(state.global_step, state.max_steps)

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
            "sparsity/active": float(context.is_sparse),
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
