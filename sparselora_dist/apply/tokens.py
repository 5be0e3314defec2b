"""For losses of one's own: which tokens are context, and which forwards take the same masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from ..layers.micro_batch import GivenTokens
from ..method.tokens import IGNORE_INDEX
from .state import state_of


@contextmanager
def sparse_tokens(
    model: nn.Module,
    *,
    labels: Tensor | None = None,
    completion_mask: Tensor | None = None,
    logits: Literal["all", "labels"] = "all",
) -> Iterator[None]:
    """Say which tokens are context, for the forwards within, whose caller does not pass labels to the model.

    For a loss that is computed from the logits outside the model. Such a forward is sparse, by the schedule, where it is
    in training mode, with gradients or without; in evaluation it is dense as ever. A forward that has labels goes by them.

    Args:
        model: a model that ``apply_sparselora`` was called on, or what wraps it.
        labels: (B, S) int64, -100 at context tokens, as for the model: entry t is token t itself, not the next.
        completion_mask: the same as a (B, S) mask, bool or int, 0 at context tokens; one of the two is given.
        logits: ``all``: the model's logits are (B, S, vocabulary), and the loss must not read those of context tokens
            whose next token is context, because they are sparse. ``labels``: (1, n, vocabulary), those of the positions
            whose next token has a label, in their order, as in training with labels (``skip_unused_logits``).

    Raises:
        ValueError: the model is not sparse; none of the two is given, or both; something that is not (B, S); a forward
            of another shape; ``labels`` of logits where ``skip_unused_logits`` is off.
        RuntimeError: it is already open on this model.
    """
    state = state_of(model)
    if (labels is None) == (completion_mask is None):
        raise ValueError("sparse_tokens takes labels or completion_mask, one of the two")
    given = labels if labels is not None else completion_mask
    if not isinstance(given, Tensor) or given.dim() != 2:
        name = "labels" if labels is not None else "completion_mask"
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"sparse_tokens: {name} must be a (rows, positions) tensor, not {shape}")
    if logits not in ("all", "labels"):
        raise ValueError(f"sparse_tokens: logits={logits!r} must be 'all' or 'labels'")
    if logits == "labels" and not state.config.skip_unused_logits:
        raise ValueError("sparse_tokens: logits='labels' needs skip_unused_logits, which is off in this model's config")
    if state.context.given is not None:
        raise RuntimeError("sparse_tokens is already open on this model: close it first")
    if labels is None:
        # Only where labels are is read of them, as nobody takes a loss by them.
        labels = given.new_zeros(given.shape, dtype=torch.long).masked_fill_(given == 0, IGNORE_INDEX)
    state.context.given = GivenTokens(labels, packed=logits == "labels")
    try:
        yield
    finally:
        state.context.given = None


@contextmanager
def shared_masks(model: nn.Module) -> Iterator[None]:
    """The first training forward within chooses its channels; all others take them, whatever tokens they see.

    For loops that compare forwards of the same tokens in other batches, such as PPO: open it from the old policy's
    log-probabilities to the last step on them. All forwards are sparse, or dense, as the first was, though the schedule
    switch meanwhile. Forwards that are given the very same ``input_ids`` within a step need it not.

    Raises:
        ValueError: the model is not sparse.
        RuntimeError: it is already open on this model.
    """
    sharing = state_of(model).context.sharing
    sharing.open()
    try:
        yield
    finally:
        sharing.close()
