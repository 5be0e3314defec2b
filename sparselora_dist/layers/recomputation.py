"""Which forward a layer belongs to that activation checkpointing runs again in backward."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .micro_batch import MicroBatch


def in_backward() -> bool:
    """Whether autograd is running, that is a layer that runs now is being recomputed."""
    return torch._C._current_graph_task_id() != -1


class Recomputation:
    """The layer that is being recomputed, and the micro-batch of its first run, known by the memory of the layer's input."""

    def __init__(self) -> None:
        self.watched: set[int] = set()
        """Layers whose inputs are seen, see :class:`~.hooks.LayerHook`."""
        self._layer: int | None = None
        self._batch: MicroBatch | None = None

    def enter(self, layer: int, address: int, forwards: Iterable[MicroBatch]) -> bool:
        """A watched layer begins again with the input at ``address``; whether one of ``forwards``, the newest first, is
        its own."""
        # The newest one with this address: the memory of a finished forward may have been given out again.
        self._layer = layer
        self._batch = next((batch for batch in forwards if batch.inputs.get(layer) == address), None)
        return self._batch is not None

    def batch_of(self, layer: int) -> MicroBatch | None:
        """The micro-batch of the running ``layer``, ``None`` outside backward.

        Raises:
            RuntimeError: the layer is recomputed from its middle on, so that it is lost which forward it belongs to.
        """
        if not in_backward():
            return None
        if layer in self.watched and layer != self._layer:
            raise RuntimeError(
                f"a part of layer {layer} is recomputed in backward without the layer's beginning: checkpoint whole decoder "
                "layers (gradient_checkpointing_enable)"
            )
        return self._batch
