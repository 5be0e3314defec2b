"""Trainers that compute their loss outside the model, which then comes without labels: which tokens are context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..apply import sparse_tokens


class SparseLossMixin:
    """``class MyTrainer(SparseLossMixin, Trainer): pass``: a loss of one's own is computed sparsely, too.

    For the Hugging Face Trainer with ``label_smoothing_factor`` or ``compute_loss_func``, which take the labels out of
    the batch, and for TRL's ORPO and CPO trainers, which read the logits of both answers. The model's logits stay whole:
    the loss may read those of tokens whose own label, or the next one's, is not -100.
    """

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the trainer's, the labels of ``inputs`` naming the context."""
        labels = inputs.get("labels")
        inner: Any = super()
        if not model.training or not isinstance(labels, Tensor) or labels.dim() != 2:
            return inner.compute_loss(model, inputs, *args, **kwargs)
        with sparse_tokens(model, labels=labels):
            return inner.compute_loss(model, inputs, *args, **kwargs)

    def concatenated_forward(self, model: nn.Module, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """ORPO's and CPO's: chosen rows, then rejected ones; the prompt is context where no loss reads it."""
        trainer: Any = self
        inner: Any = super()
        if not model.training:
            return inner.concatenated_forward(model, batch, *args, **kwargs)
        padding = getattr(trainer, "padding_value", None)
        whole = trainer.concatenated_inputs(
            batch,
            is_encoder_decoder=trainer.is_encoder_decoder,
            padding_value=trainer.pad_token_id if padding is None else padding,
            device=trainer.accelerator.device,
        )
        labels = whole["concatenated_labels"]
        if hasattr(trainer, "odds_ratio_loss"):
            # ORPO's likelihood of the chosen rows is that of their prompts, too.
            rows = torch.arange(len(labels), device=labels.device).unsqueeze(1)
            read = (whole["concatenated_attention_mask"] == 1) & (rows < len(batch["chosen_labels"]))
            labels = torch.where(read, whole["concatenated_input_ids"], labels)
        with sparse_tokens(model, labels=labels):
            return inner.concatenated_forward(model, batch, *args, **kwargs)
