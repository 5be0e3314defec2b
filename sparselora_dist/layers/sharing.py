"""Forwards that belong together take the same masks: a policy and its reference, a policy and its older self.

Objectives such as DPO compare two forwards of the same tokens, one of them without gradients. Were their channels chosen
apart, the comparison would measure the channels. Two rules make them one:

- *The same tokens.* A forward without gradients takes the masks of a forward of this optimizer step that was given the
  very same ``input_ids`` (by address, version and shape; they are held, so that their memory is nobody else's). One with
  gradients takes those of a forward without gradients, once. It never takes those of another one with gradients:
  whoever trains on one batch again and again chooses anew each time.
- *A scope*, for who lays the tokens into other batches between the two (GRPO): its first forward chooses, all others
  take its masks, and are sparse or dense as it was. ``shared_masks`` opens one; the Trainer's callback has one opened by
  the first forward without gradients, and closed after a count of forwards with gradients.

Every rank runs the same forwards, so every rank takes or chooses alike, and mask collectives stay paired. Nothing here
reads a value on a device.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..method.tokens import TokenPartition
from .micro_batch import MicroBatch

# Forwards whose masks may be asked for again.
_REMEMBERED = 8


@dataclass(slots=True, eq=False)
class Given:
    """What a forward was given, recognised by its memory."""

    tokens: Tensor | None
    """(B, S) ``input_ids``; where there are none, the labels stand for them: embeddings are too large to be held."""
    labels: Tensor
    attention_mask: object
    shifted: bool
    _versions: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        if self.tokens is None or self.tokens.is_floating_point():
            self.tokens = self.labels
        self._versions = _version(self.tokens), _version(self.labels), _version(self.attention_mask)

    def same_tokens(self, other: Given) -> bool:
        return self._versions[0] == other._versions[0] and same_memory(self.tokens, other.tokens)

    def same_labels(self, other: Given) -> bool:
        """Then the token partition is the same, too."""
        if self.shifted != other.shifted or self._versions[1:] != other._versions[1:]:
            return False
        masks = self.attention_mask, other.attention_mask
        return same_memory(self.labels, other.labels) and (masks[0] is masks[1] or same_memory(*masks))


@dataclass(slots=True, eq=False)
class _Seen:
    """A forward that is remembered."""

    given: Given
    batch: MicroBatch
    teaches: bool
    """Whether a forward with gradients may take its masks."""


@dataclass(slots=True, eq=False)
class _Scope:
    sparse: bool | None = None
    """As its first forward was; ``None`` before it."""
    first: MicroBatch | None = None
    left: int | None = None
    """Forwards with gradients that are still its own; ``None``: until it is closed."""
    learned: bool = False
    """Whether there was one with gradients."""


class MaskSharing:
    """Which forwards of one model take the masks of which."""

    def __init__(self) -> None:
        self.generation = 0
        """Micro-batches that are trained on what one round of forwards without gradients has measured; such a round
        opens a scope for them. 0: none does."""
        self._seen: deque[_Seen] = deque(maxlen=_REMEMBERED)
        self._scope: _Scope | None = None
        self._step: int | None = None
        self._watched: Tensor | None = None
        self._watched_version: int | None = None

    def reset(self, generation: int = 0) -> None:
        """Forget all, at the begin and the end of a run."""
        self._seen.clear()
        self._scope, self.generation = None, generation

    # --- scopes -----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Begin a scope that lasts until :meth:`close`.

        Raises:
            RuntimeError: one is open.
        """
        if self._scope is not None and self._scope.left is None:
            raise RuntimeError("shared_masks is already open on this model: close it first")
        self._scope = _Scope()

    def close(self) -> None:
        self._scope = None

    def enter(self, sparse: bool, gradients: bool) -> bool:
        """Whether the training forward that begins is sparse, where the schedule says ``sparse``."""
        scope = self._scope
        if self.generation and (scope is None or scope.left is not None):
            if not gradients and (scope is None or scope.learned):
                scope = _Scope(left=self.generation)
            elif gradients and scope is not None:
                if scope.left:
                    scope.left, scope.learned = scope.left - 1, True
                else:
                    scope = None
            self._scope = scope
        if scope is None:
            return sparse
        if scope.sparse is None:
            scope.sparse = sparse
        return scope.sparse

    # --- a forward --------------------------------------------------------------------------------------------------

    def at(self, step: int | None, module: object) -> None:
        """What was seen in another optimizer step is forgotten.

        Without a ``step`` a step is told by the adapter of ``module``, which the optimizer changes in place.
        """
        version = None
        if step is None:
            if self._watched is None and isinstance(module, nn.Module):
                self._watched = next((p for p in module.parameters() if p.requires_grad), None)
            version = None if self._watched is None else _version(self._watched)
        known = version is not None and self._watched_version is not None
        if step != self._step or (known and version != self._watched_version):
            self._seen.clear()
        self._step, self._watched_version = step, version if version is not None else self._watched_version

    def partition(self, given: Given) -> TokenPartition | None:
        """That of a remembered forward with the same labels: nothing is waited for."""
        return next((seen.batch.partition for seen in reversed(self._seen) if seen.given.same_labels(given)), None)

    def share(self, given: Given, batch: MicroBatch) -> None:
        """Give ``batch``, a sparse forward that begins, the masks that it shares, if any, and remember it."""
        gradients = batch.learns
        alike = [seen for seen in reversed(self._seen) if seen.given.same_tokens(given)]
        taught = next((seen for seen in alike if seen.teaches or not gradients), None)
        source, teaches = (taught.batch, taught.teaches) if taught else (None, True)
        if gradients:  # What they knew is used up.
            teaches = False
            for seen in alike:
                seen.teaches = False
        if self._scope is not None:
            source = self._scope.first
            self._scope.first = source or batch
        self._seen.append(_Seen(given, batch, teaches))
        if source is not None:
            batch.masks.update(source.masks)
            batch.rows.update(source.rows)


def same_memory(one: object, other: object) -> bool:
    """By address, because engines may rewrap a tensor; while one is held, its memory is nobody else's."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return one is other or (one.shape == other.shape and one.data_ptr() == other.data_ptr() != 0)


def _version(value: object) -> int:
    """How often it was written to; memory that is filled again is not what it was."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else -1
