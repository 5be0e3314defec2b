"""The hooks that tell a model's sparse context where a forward begins and ends, and which layer runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .context import SparseContext
from .recomputation import in_backward
from .traced import lengths_vary


class BeginHook:
    """Forward pre-hook of the model: labels become the token partition."""

    def __init__(self, context: SparseContext) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):
            raise ValueError(
                "nn.DataParallel is not supported: its replicas would share one sparse context. The Trainer uses it by "
                "itself where one process sees several GPUs: start one process per GPU (torchrun or accelerate launch), "
                "or let the process see one (CUDA_VISIBLE_DEVICES)"
            )
        if not self.context.in_forward:
            self._begin(module, args, kwargs)

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        labels, shifted = kwargs.get("labels"), False
        if kwargs.get("shift_labels") is not None:
            # They win in the loss too; sequence parallelism passes them beside labels.
            labels, shifted = kwargs["shift_labels"], True
        tokens = _tokens(args, kwargs)
        self.context.begin(
            labels,
            kwargs.get("attention_mask"),
            module.training,
            shifted,
            opened_by=module,
            logits_only=not _asks_for_more(module, kwargs),
            # Where the model computes; labels may still be on the host, as the loss moves them.
            device=None if tokens is None else tokens.device,
            tokens=tokens,
        )
        lengths_vary(self.context.lists())


def _tokens(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """What the model reads: (B, S) ids, or (B, S, H) embeddings."""
    values = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
    return next((value for value in values if isinstance(value, Tensor)), None)


def _asks_for_more(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the caller reads hidden states or attentions, or chose the logits' positions."""
    for key in ("output_hidden_states", "output_attentions"):
        if kwargs[key] if kwargs.get(key) is not None else getattr(module.config, key, False):
            return True
    keep = kwargs.get("logits_to_keep")
    return isinstance(keep, Tensor) or bool(keep)


class FinishHook:
    """Forward hook of the module that opened the micro-batch."""

    def __init__(self, context: SparseContext) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.context.opened_by is module:
            self._finish(module)

    @torch.compiler.disable
    def _finish(self, module: nn.Module) -> None:
        self.context.finish(module)


class OuterBeginHook(BeginHook):
    """Of the outermost module, whose hooks run before ``torch.compile`` begins to trace: not a graph of its own."""

    __call__ = torch.compiler.disable(BeginHook.__call__)


class OuterFinishHook(FinishHook):
    """The same, at the end."""

    __call__ = torch.compiler.disable(FinishHook.__call__)


class LayerHook:
    """Forward pre-hook of the first module that sees a decoder layer's input: remembers, or recognises, that.

    ``required`` says that recomputing the layer is an error where its first forward is not known.
    """

    def __init__(self, context: SparseContext, layer: int, required: bool = True) -> None:
        self.context, self.layer, self.required = context, layer, required
        context.recomputation.watched.add(layer)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            # A graph of the whole model recomputes by itself, and its operations find their forward by its ticket.
            if not self.context.in_forward:
                self._refuse_recomputation()
        elif torch.is_grad_enabled() or self.context.in_forward:
            hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            self.context.enter_layer(self.layer, hidden, self.required)

    @torch.compiler.disable
    def _refuse_recomputation(self) -> None:
        """Raises RuntimeError in recomputation: of a layer compiled by itself it is lost which forward it belongs to."""
        if self.required and in_backward():
            raise RuntimeError(
                f"layer {self.layer} is compiled apart from the model and recomputed in backward: compile the whole model "
                "(torch.compile(model), torch_compile=True), or leave out activation checkpointing"
            )
