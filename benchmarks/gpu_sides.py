"""A model that takes steps, and the batches that it takes them on, for benchmarks/gpu.py."""

from __future__ import annotations

from typing import Any

import torch
from gpu_models import autocast, held_bytes
from gpu_timing import free
from torch import Tensor

from sparselora_dist.apply import find_state
from sparselora_dist.method.tokens import TokenPartition, partition_tokens

KINDS = ("full", "padded", "packed")
"""Rows of full length; rows between a half and the whole of it, padded on the right, with their attention mask; the same
rows one after another in one line, with position ids."""


class Side:
    """One of the two models, and what takes a step of it."""

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
        state = find_state(model)
        self.context = None if state is None else state.context
        self._partition: tuple[Tensor, TokenPartition] | None = None

    def gradients(self, batch: dict[str, Tensor]) -> Tensor:
        """Forward and backward; the loss. As in a run of ours, the partition was made on the host, and masks are not
        compared before the step."""
        if self.context is not None:
            self.context.check_masks = "caller"
            self.context.hand_over(batch["labels"], self._split(batch))
        with autocast(self.device, self.dtype):
            loss = self.model(**batch).loss
        loss.backward()
        return loss.detach()

    def _split(self, batch: dict[str, Tensor]) -> TokenPartition:
        labels, mask = batch["labels"], batch.get("attention_mask")
        if self._partition is None or self._partition[0] is not labels:
            split = partition_tokens(labels.cpu(), None if mask is None else mask.cpu())
            self._partition = labels, split.to(self.device)
        return self._partition[1]

    def step(self, batch: dict[str, Tensor]) -> None:
        self.gradients(batch)
        if self.context is not None:
            self.context.sync.check()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def checkpointing(self, on: bool) -> None:
        if on:
            options = {"use_reentrant": False, "preserve_rng_state": False}  # Nothing drops out.
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        else:
            self.model.gradient_checkpointing_disable()

    def clear(self) -> None:
        """After an error: nothing of the step is left."""
        self.optimizer.zero_grad(set_to_none=True)
        free()

    @property
    def held(self) -> int:
        state = [t for entry in self.optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
        return held_bytes(self.model) + sum(t.nbytes for t in state)


def make_batch(
    vocabulary: int, tokens: int, length: int, context: float, device: torch.device, kind: str = "full"
) -> dict[str, Tensor]:
    """About ``tokens`` real tokens in rows of at most ``length``, of a ``kind`` (see :data:`KINDS`). A share ``context`` of
    each row has no label and precedes none; one label a row at least.

    Returns:
        ``input_ids`` and ``labels`` (rows, length), int64; padded also ``attention_mask``; packed all of them (1, tokens),
        with ``position_ids`` that begin at 0 in every row.
    """
    length = min(length, tokens)
    generator = torch.Generator().manual_seed(1)
    lengths = [length] * (tokens // length)
    if kind != "full":
        lengths = []
        while sum(lengths) < tokens:
            lengths.append(int(torch.randint(-(-length // 2), length + 1, (), generator=generator)))
    rows = [torch.randint(0, vocabulary, (n,), generator=generator) for n in lengths]
    labels = [row.clone() for row in rows]
    for row in labels:
        row[: max(1, min(round(context * row.numel()) + 1, row.numel() - 1))] = -100
    if kind == "packed":
        positions = torch.cat([torch.arange(row.numel()) for row in rows])
        batch = {"input_ids": torch.cat(rows)[None], "labels": torch.cat(labels)[None], "position_ids": positions[None]}
    else:
        pad = torch.nn.utils.rnn.pad_sequence
        batch = {"input_ids": pad(rows, True, 0), "labels": pad(labels, True, -100)}
        if kind == "padded":
            batch["attention_mask"] = pad([torch.ones_like(row) for row in rows], True, 0)
    return {name: value.to(device) for name, value in batch.items()}
