"""A frozen linear whose weight is stored by a codec, with the channel as dim 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparselora_kernels import Weight, lora_linear
from sparselora_kernels.stored import unpack

from ..sharding.parameters import is_dtensor, is_zero3
from ..sharding.placement import waiting_rows
from .base import Codec
from .plain import PlainCodec

Branch = tuple[Tensor, Tensor, float]
"""A LoRA branch: ``A`` (r, in), ``B`` (out, r) and its scaling."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast asks for; that of ``x`` without autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def compute_input(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast asks for; as it is without autocast."""
    return x.to(compute_dtype(x))


class _Turned(Tensor):
    """A stored weight, turned: what is assigned to its ``data`` is stored. PEFT's safe merge writes so.

    An adapter that came after :func:`apply_sparselora` on a bare model merges into this, by PEFT's own ``merge``.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    stored: Tensor

    @staticmethod
    def of(stored: Tensor) -> Tensor:
        turned = stored.detach().t().as_subclass(_Turned)
        turned.stored = stored
        return turned

    @property
    def data(self) -> Tensor:
        return self.stored.data.t()

    @data.setter
    def data(self, value: Tensor) -> None:
        self.stored.data.copy_(value.t())


class FrozenMatrix(nn.Module):
    """A frozen matrix as a codec stores it, with the channel as dim 0.

    Args:
        codec: how it is stored.
        parts: the codec's parameters, (channels, ...) each.
        row_length: values of a channel.
    """

    def __init__(self, codec: Codec, parts: Mapping[str, nn.Parameter], row_length: int) -> None:
        nn.Module.__init__(self)
        self.codec, self.row_length = codec, row_length
        self.part_names = tuple(codec.parts(row_length))
        for name in self.part_names:
            self.register_parameter(name, parts[name])

    @property
    def parts(self) -> tuple[nn.Parameter, ...]:
        """The stored parameters, in the codec's order."""
        return tuple(getattr(self, name) for name in self.part_names)

    @property
    def obstacle(self) -> str | None:
        """Why the family's own weight cannot be asked for now; ``None`` where it can."""
        first = self.parts[0]
        if not isinstance(self.codec, PlainCodec):
            return f"the base weights are stored as {self.codec.name}"
        if is_zero3(first) or is_dtensor(first) or waiting_rows(first) is not None:
            return "an engine has sharded the base weights"
        return None

    @property
    def stored(self) -> Weight:
        """As the kernels take it."""
        return self.codec.stored(self.parts, self.row_length)

    def rows_of(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The channels (C, length) that whole (gathered) parts hold."""
        return unpack(self.codec.stored(tuple(parts), self.row_length)).decode(None, dtype)


class FrozenLinear(FrozenMatrix, nn.Linear):
    """Takes the place of a frozen ``nn.Linear``.

    It is one by type, because PEFT asks; it never holds a trainable ``weight``.

    Args:
        in_features, out_features: of the linear.
        bias: (out,), frozen, or ``None``.
        codec: how the weight is stored.
        parts: the codec's parameters: of the weight (out, in), or transposed (down, o) of (in, out), so that a kept
            channel is one row there too.
        transposed: which of the two.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        codec: Codec,
        parts: Mapping[str, nn.Parameter],
        *,
        transposed: bool,
    ) -> None:
        FrozenMatrix.__init__(self, codec, parts, out_features if transposed else in_features)
        self.in_features, self.out_features = in_features, out_features
        self.transposed = transposed
        self.register_parameter("bias", bias)

    @classmethod
    def adopt(cls, linear: nn.Linear, stored: nn.Parameter, *, transposed: bool) -> FrozenLinear:
        """In the place of a plain linear; ``stored`` is its weight, or its weight transposed."""
        parts = {"rows": stored}
        frozen = cls(
            linear.in_features, linear.out_features, linear.bias, PlainCodec(stored.dtype), parts, transposed=transposed
        )
        return frozen.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """For PEFT, which puts adapters where a base layer's weight is: a view of the plain weight, or the codes."""
        first = self.parts[0]
        if (rows := waiting_rows(first)) is not None:  # FSDP2 has not sharded yet.
            return rows
        if not self.transposed or not isinstance(self.codec, PlainCodec):
            return first
        return first.t() if self.obstacle else _Turned.of(first)

    def plain(self) -> nn.Linear:
        """The family's own linear with this weight; its memory is shared where it is not stored transposed."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = self.parts[0]
        if self.transposed:
            weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=False)
        linear.weight = weight
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def take(self, linear: nn.Linear) -> None:
        """Store the weight of what :meth:`plain` gave, which was changed meanwhile."""
        own, weight = self.parts[0], linear.weight
        if own is not weight:
            with torch.no_grad():
                own.copy_(weight.t() if self.transposed else weight)

    def matrix(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that whole (gathered) parts hold."""
        rows = self.rows_of(parts, dtype)
        return rows.t() if self.transposed else rows

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., in) -> (..., out), all channels."""
        return self.product(x)

    def lists(self, x: Tensor) -> dict[str, Tensor]:
        """``dense_rows``, ``context_rows`` and ``channels`` of :func:`lora_linear` for an input (..., in) in the dtype of
        the computation; empty where all tokens are computed whole."""
        return {}

    def product(self, x: Tensor, branch: Branch | None = None, **options: Any) -> Tensor:
        """``forward``, with a LoRA branch where one is given; ``options`` are :func:`lora_linear`'s."""
        x = compute_input(x)
        flat = x.reshape(-1, x.shape[-1])
        options |= self.lists(flat)
        y = lora_linear(flat, self.stored, self.bias, *(branch or ()), transposed=self.transposed, **options)
        return y.view(*x.shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, codec={self.codec.name}, "
            f"transposed={self.transposed}"
        )
