"""The FFN without a gate of a sparse layer, ``down(act(up(x)))``: two linears of the family's own module.

The module stays, and so does what it computes between the two, its activation and its dropout: that is elementwise, which
the layout has tried, so that it may be given the kept neurons of all tokens one after another. Only ``forward`` of the two
linears, or of the LoRA layers around them, is another.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from ..codecs.linear import compute_input
from ..layouts import base_linear
from ..method.tokens import TokenPartition
from .context import SparseContext
from .estimator import PlainFFNEstimator
from .neurons import Chosen, NeuronChooser, known, project, project_down, project_up, rows_and_channels


class PlainFFN(NeuronChooser):
    """What up and down of one FFN share. See :class:`~.ffn.SparseFFN` for ``keep`` and ``lora_branch``.

    Not a module: it refers to the two linears where they are, and to the estimator, which is registered beside them.

    Args:
        parent: what holds the two; it must call this before its own forward, as a pre-hook.
        names: of up and down there.
    """

    def __init__(
        self,
        parent: nn.Module,
        names: tuple[str, str],
        *,
        estimator: PlainFFNEstimator,
        context: SparseContext,
        layer: int,
        keep: int,
        lora_branch: Literal["kept", "dense"],
    ) -> None:
        self.parent, self.names = parent, names
        self.estimator = estimator
        self.set_up(context, layer, keep, lora_branch)
        self._given: tuple[TokenPartition, Chosen, tuple[int, ...], bool] | None = None
        """From up to down of one forward: tokens, neurons, the input's shape, whether all neurons are there."""
        self._linears: tuple[nn.Module, ...] = ()

    def take_over(self) -> None:
        """Stand in front of the two as they are now, fused or not."""
        self.release()
        self._linears = self._now()
        for linear, compute in zip(self._linears, (self.up, self.down)):
            own = linear.__dict__.get("forward")
            linear.__dict__["forward"] = _Instead(linear, own, compute)

    def release(self) -> None:
        """Undo :meth:`take_over`."""
        for linear in self._linears:
            if isinstance(instead := linear.__dict__.get("forward"), _Instead):
                del linear.__dict__["forward"]
                if instead.own is not None:
                    linear.__dict__["forward"] = instead.own

    def _now(self) -> tuple[nn.Module, ...]:
        return tuple(getattr(self.parent, name) for name in self.names)

    def __call__(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of what holds the two: an adapter may have come, or gone, since."""
        if self._now() != self._linears:
            self.take_over()

    def sums(self, x: Tensor, rows: Tensor) -> tuple[Tensor]:
        return self.estimator(x, rows, base_linear(self._linears[0]).bias)

    def up(self, x: Tensor) -> Tensor | None:
        """``x`` (..., H) -> what is kept, dense tokens before context tokens, in as many dimensions as ``x`` has; with
        LoRA branches that keep all neurons (..., I); ``None`` where the layer is dense."""
        self._given = None
        batch = self.context.active(self.site.layer, "ffn")
        if batch is None or self._now() != self._linears:
            return None
        assert batch.partition is not None
        tokens, outer = batch.partition, self._linears[0]
        flat = compute_input(x).reshape(-1, x.shape[-1])
        chosen, whole = self.neurons(flat, batch), self.branch_is_whole(*self._linears)
        self._given = tokens, chosen, x.shape[:-1], whole
        if whole:
            return project(outer, flat, rows_and_channels(tokens, chosen)).view(*x.shape[:-1], -1)
        y = project_up(outer, flat, tokens, chosen)
        return y.view(*(1 for _ in x.shape[:-1]), -1)

    def down(self, h: Tensor) -> Tensor | None:
        """What :meth:`up` gave, activated -> (..., H); ``None`` where up gave nothing."""
        if self._given is None:
            return None
        (tokens, chosen, shape, whole), self._given = self._given, None
        outer, channels = self._linears[1], known(chosen)
        if whole:
            flat = compute_input(h).reshape(-1, h.shape[-1])
            return project(outer, flat, rows_and_channels(tokens, channels)).view(*shape, -1)
        dense, context = tokens.dense.shape[0], tokens.context.shape[0]
        k, width = channels.shape[0], base_linear(outer).in_features
        parts = compute_input(h).flatten().split([dense * width, context * k])
        hidden = parts[0].view(dense, width), parts[1].view(context, k)
        return project_down(outer, *hidden, tokens, channels).view(*shape, -1)


class _Instead:
    """Takes the place of ``forward`` of one of the two; an object, so that it is copied with its model."""

    def __init__(self, linear: nn.Module, own: Any, compute: Any) -> None:
        self.linear, self.own, self.compute = linear, own, compute

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = None if args or kwargs else self.compute(x)
        if found is not None:
            return found
        if self.own is not None:
            return self.own(x, *args, **kwargs)
        return type(self.linear).forward(self.linear, x, *args, **kwargs)
