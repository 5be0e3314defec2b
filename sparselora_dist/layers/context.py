"""What the sparse modules of one model share during a step: the token partition, the schedule, the chosen masks.

A forward of the model opens a :class:`MicroBatch`; the layers ask for it and leave their masks in it. When activation
checkpointing runs a layer again during backward, the layer finds the micro-batch of its first run and reuses its masks:
nothing is selected and nothing is communicated twice. The micro-batch is recognised by the memory of the layer's
input, which checkpointing keeps alive until then, so that several forwards may be pending before their backwards.

Nothing here waits for a GPU but making the token partition from labels that are on it, once per forward, and comparing
the mask collectives; a training loop that has the batch on the host saves the first (:meth:`SparseContext.hand_over`)
and does the second once per optimizer step (:attr:`SparseContext.check_masks`).
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..method.schedule import is_sparse_step
from ..method.tokens import TokenPartition, partition_tokens
from ..sync.masks import MaskSync, Site
from .held import HeldMasks
from .micro_batch import OPEN, GivenTokens, LossPositions, MicroBatch, TokenCounts
from .recomputation import Recomputation, in_backward
from .sharing import Given, MaskSharing, same_memory

# Forwards whose backward may still be to come.
_PENDING_FORWARDS = 64


class SparseContext:
    """State shared by the sparse modules of one model.

    Args:
        sync: adds the score sums over ranks.
        start_step, end_step: of the schedule, see :func:`sparselora_dist.method.schedule.is_sparse_step`.
        interval: optimizer steps for which a mask is kept.
    """

    def __init__(
        self, sync: MaskSync, start_step: float | int = 0.0, end_step: float | int | None = None, interval: int = 1
    ) -> None:
        self.sync = sync
        self.start_step, self.end_step = start_step, end_step
        self.held = HeldMasks(interval)
        self.step: int | None = None
        self.total_steps: int | None = None
        self.counts = TokenCounts()
        self.enabled = True
        self.skip_unused_logits = False
        self.chunk_loss = False
        """Training forwards give the loss alone, whose logits are made chunk by chunk, see :mod:`.logits`."""
        self.evaluating = False
        """Forwards with labels in evaluation mode give each label's loss and whether it was right, see :mod:`.logits`."""
        self.head_unit = 1.0  # Of losses and scores that are given in the place of logits.
        self.last_layer: int | None = None
        """The layer that may compute only what the loss reads, see :mod:`.last_layer`."""
        self.check_masks: Literal["next", "each", "caller"] = "next"
        """When the mask collectives of a forward are compared on a GPU, which waits for it: before the next forward, at
        the forward's own end, or never here, because the caller does so before each optimizer step."""
        self.sparse_references = True
        """Training forwards without gradients are as sparse as those with; False: they are dense."""
        self.sharing = MaskSharing()
        self.given: GivenTokens | None = None
        """The tokens of forwards that come without labels, see :func:`sparselora_dist.sparse_tokens`."""
        self.probe: Mapping[tuple[int, str], int] | None = None
        """Channels to keep by (layer, group). While it is set, every forward with labels is sparse at these sites and
        dense elsewhere, in evaluation too and whatever the schedule says. Set it between forwards, on every rank."""
        self._current: MicroBatch | None = None
        self.opened_by: object = None
        self._outer_loss: LossPositions | None = None
        self.recomputation = Recomputation()
        self._forwards: deque[MicroBatch] = deque(maxlen=_PENDING_FORWARDS)
        self._training_forwards = 0
        self._handed: tuple[Tensor, TokenPartition] | None = None
        self._warned = self._warned_labels = False

    # --- schedule ---------------------------------------------------------------------------------------------

    def set_step(self, step: int, total_steps: int) -> None:
        """Tell the schedule that optimizer step ``step`` (from 0) of ``total_steps`` begins."""
        self.step, self.total_steps = step, total_steps

    @property
    def is_sparse(self) -> bool:
        """Whether training forwards are sparse now."""
        if not self.enabled:
            return False
        if self.step is None or self.total_steps is None:
            whole_run = self.start_step in (0, 0.0) and self.end_step in (None, 1.0)
            if not whole_run and not self._warned:
                self._warned = True
                warnings.warn(
                    f"start_step={self.start_step}, end_step={self.end_step} have no effect: nothing drives the "
                    "schedule. Add SparseLoRACallback to the Trainer, or call set_step(model, step, total_steps)",
                    stacklevel=2,
                )
            return True
        return is_sparse_step(self.step, self.total_steps, self.start_step, self.end_step)

    # --- a forward of the model ---------------------------------------------------------------------------------

    def hand_over(self, labels: Tensor, partition: TokenPartition) -> None:
        """Give the partition of the forward that comes next with ``labels``; it was made on the host, without a wait."""
        self._handed = labels, partition

    def begin(
        self,
        labels: Tensor | None,
        attention_mask: object,
        training: bool,
        shifted: bool = False,
        opened_by: object = None,
        logits_only: bool = True,
        device: torch.device | None = None,
        tokens: Tensor | None = None,
    ) -> None:
        """Open the micro-batch of a forward.

        Without labels, or tokens that were named for it, and in evaluation, everything is dense (see ``probe``).
        ``logits_only`` says that nobody reads more of the last decoder layer than what the loss reads; ``device`` is
        where the model computes, by default that of the labels; ``tokens``, (B, S), is what the forward reads: by their
        memory it is recognised (:mod:`.sharing`).
        """
        if self.check_masks == "next":
            self.sync.check()
        handed, self._handed = self._handed, None
        named = self.given if labels is None else None
        if named is not None:
            labels, shifted = named.labels_of(tokens), False
        # Reentrant checkpointing turns gradients off inside the layers only: here it is still on.
        gradients = torch.is_grad_enabled()
        training = training and (gradients or self.sparse_references)
        evaluating = self.evaluating and not training
        batch = MicroBatch(None, learns=training and gradients)
        if labels is not None and (training or evaluating or self.probe is not None):
            sparse = self.probe is not None or (training and self.sharing.enter(self.is_sparse, gradients))
            packed = (self.skip_unused_logits or evaluating) and not shifted and (named is None or named.packed)
            if sparse or packed:
                given = Given(tokens, labels, attention_mask, shifted)
                self.sharing.at(self.step, opened_by)
                if handed is not None and same_memory(handed[0], labels) and not shifted:
                    found = handed[1]
                else:
                    with torch.inference_mode(False):
                        found = self.sharing.partition(given) or partition_tokens(
                            labels, attention_mask, shifted=shifted
                        )
                if device is not None and found.dense.device != device:
                    found = found.to(device)
                if packed:
                    asked: Any = "scores" if evaluating else "sum" if self.chunk_loss and named is None else "rows"
                    batch.loss = LossPositions(labels.shape, found.loss_rows, found.loss_labels, asked)
                batch.partition = found if sparse else None
            if batch.partition is not None and self.probe is None:
                self.counts.dense += found.dense.numel()
                self.counts.context += found.context.numel()
                self.sharing.share(given, batch)
        elif batch.learns and self.enabled and not self._warned_labels:
            self._warned_labels = True
            warnings.warn(
                "a training forward came without labels and was computed densely: pass labels to the model (a custom loss "
                "function or label smoothing takes them out), or say which tokens are context: SparseLossMixin in a "
                "Trainer, sparse_tokens(model, labels=...) in a loop of your own",
                stacklevel=2,
            )
        if batch.loss is not None and (training or evaluating) and logits_only:
            batch.last_layer = self.last_layer
        self._current, self.opened_by = batch, opened_by
        self._outer_loss, OPEN.loss = OPEN.loss, batch.loss
        if batch.learns:
            self._training_forwards += 1
            self._forwards.append(batch)
            self.held.put(batch.masks, self._now, over=False)  # Those that it was given.

    @property
    def _now(self) -> int:
        """The optimizer step, by which masks are kept."""
        return self._training_forwards if self.step is None else self.step

    def finish(self, opened_by: object = None) -> None:
        """Close the micro-batch that ``opened_by`` opened: from here on, a layer that runs is being recomputed."""
        if self.opened_by is opened_by:
            self._current = self.opened_by = None
            OPEN.loss, self._outer_loss = self._outer_loss, None
            if self.check_masks == "each":
                self.sync.check()

    @property
    def in_forward(self) -> bool:
        return self._current is not None

    def lists(self) -> Iterator[Tensor]:
        """Of the running forward, the tensors whose length depends on the labels."""
        return self._current.lists() if self._current is not None else iter(())

    @property
    def loss_positions(self) -> LossPositions | None:
        """Of the running forward."""
        if torch.compiler.is_compiling():
            return OPEN.loss
        return self._current.loss if self._current is not None else None

    @property
    def last(self) -> MicroBatch | None:
        """The newest training forward, that is one with gradients."""
        return self._forwards[-1] if self._forwards else None

    def pending(self, ticket: int) -> MicroBatch:
        """The forward with this :attr:`MicroBatch.ticket`, running or waiting for its backward; RuntimeError without."""
        for batch in (self._current, *reversed(self._forwards)):
            if batch is not None and int(batch.ticket) == ticket:
                return batch
        raise RuntimeError(
            f"a compiled graph asks for masks of an unknown forward: more than {_PENDING_FORWARDS} waited for their backward"
        )

    @property
    def was_sparse(self) -> bool:
        """Whether the newest training forward was: in the schedule, and with labels."""
        return self.last is not None and self.last.partition is not None

    # --- a layer --------------------------------------------------------------------------------------------------

    def enter_layer(self, layer: int, hidden: Tensor, required: bool = True) -> None:
        """Called with each layer's input, in the forward and again in recomputation.

        Raises:
            RuntimeError: ``required``, and the forward that is recomputed is not known.
        """
        address = hidden.data_ptr()
        if self._current is not None:
            self._current.inputs[layer] = address
        elif in_backward():
            known = self.recomputation.enter(layer, address, reversed(self._forwards))
            if required and not known:
                raise RuntimeError(
                    f"layer {layer} is recomputed for a forward that is not known: more than {_PENDING_FORWARDS} "
                    "forwards were waiting for their backward, or the checkpointing moves its inputs (offloading)"
                )

    def _running(self, layer: int) -> MicroBatch | None:
        """The micro-batch that the running layer belongs to, in recomputation that of its first run."""
        if torch.compiler.is_compiling():  # A graph is never run again layer by layer, see :class:`~.hooks.LayerHook`.
            return self._current
        return self._current or self.recomputation.batch_of(layer)

    def active(self, layer: int, group: str, role: str | None = None) -> MicroBatch | None:
        """The micro-batch that the running layer belongs to, or ``None`` where its ``group`` is computed densely.

        ``role`` is the projection that asks: in a layer that computes only what the loss reads, k and v are sparse as
        ever, and q, o and the FFN whole, at positions that are all dense.
        """
        if self.probe is not None and (layer, group) not in self.probe:
            return None
        batch = self._running(layer)
        if batch is None or batch.partition is None or (layer == batch.last_layer and role not in ("k", "v")):
            return None
        return batch

    def wanted(self, layer: int) -> LossPositions | None:
        """The positions that q, o and the FFN of the running ``layer`` are computed at; ``None`` is all of them."""
        batch = self._running(layer)
        if batch is None or batch.last_layer != layer:
            return None
        return self.loss_positions if torch.compiler.is_compiling() else batch.loss

    def keep(self, layer: int, group: str, usual: int) -> int:
        """How many channels to choose: ``usual``, or what the probe says."""
        return usual if self.probe is None else self.probe.get((layer, group), usual)

    def choose(
        self,
        batch: MicroBatch,
        site: Site,
        groups: tuple[str, ...],
        select: Callable[[], Callable[[], dict[str, Tensor]]],
    ) -> Callable[[], None] | None:
        """Fill the masks of ``groups`` at ``site`` unless they are there: kept from before, or selected anew.

        ``select`` starts to; what it returns waits for the other ranks and gives the masks. So does what is returned
        here: ``None`` where the masks are there now.
        """
        if all((site.layer, group) in batch.masks for group in groups):
            return None
        if self._current is not batch:
            raise RuntimeError(f"{site} has no mask of its first forward; a mask is never chosen in recomputation")
        now = self._now
        kept = self.held.find([(site.layer, group) for group in groups], now) if self.probe is None else None
        if kept is not None:
            batch.masks.update(kept)
            return None
        # A mask that a reference chose, in inference mode, is used again where gradients are.
        with torch.inference_mode(False), torch.no_grad():
            selected = select()

        def finish() -> None:
            if all((site.layer, group) in batch.masks for group in groups):
                return  # Asked again.
            with torch.inference_mode(False), torch.no_grad():
                chosen = {(site.layer, group): mask for group, mask in selected().items()}
            if self.probe is None and batch.learns:
                self.held.put(chosen, now)
            batch.masks.update(chosen)

        if self.sync.alone:  # There is nothing to wait for.
            finish()
            return None
        return finish
