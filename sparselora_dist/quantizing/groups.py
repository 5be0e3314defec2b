"""A matrix in a format, a block of 128 inputs at a time: what has been encoded stays, whatever is still to come.

A stored row has its groups of 128 values side by side. Where inputs run along the stored row, a block is a group of every
row; where they run across (o and down are stored transposed), it is 128 whole rows. Numbers and scales are found for the
whole block. Codes too, or one input after another, each nearest to what the errors before it have made of its weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from sparselora_kernels import level_rows
from sparselora_kernels.floats import LARGEST
from sparselora_kernels.levels import numbers, pack_bits, pack_codes, pack_params

from ..codecs.billm import GROUP, fit_groups, nearest, salient_columns, tables_of
from ..codecs.floats import FloatsCodec
from ..codecs.levels import RULES, LevelsCodec


class Encoder(ABC):
    """Of one matrix (channels, length)."""

    def __init__(self, channels: int, length: int, device: torch.device) -> None:
        self.channels, self.length, self.device = channels, length, device
        self.groups = -(-length // GROUP)

    def begin(self, matrix: Tensor, costs: Tensor, across: bool) -> None:  # noqa: B027  (most decide nothing)
        """What is decided once.

        Args:
            matrix: (channels, length) fp32, before anything is encoded.
            costs: of a squared error in each input, fp32: (channels,) where they run across, else (length,).
            across: inputs are the stored rows.
        """

    @abstractmethod
    def block(self, number: int, values: Tensor, costs: Tensor, own: Tensor | None) -> Tensor:
        """Encode group ``number`` of every row.

        Args:
            values: (channels, width) fp32; the last group may be narrower than 128.
            costs: (width,) of a squared error in each of these columns.
            own: U_bb (width, width) fp32, where codes are chosen one column after another.

        Returns:
            What they decode to, fp32.
        """

    @abstractmethod
    def rows(self, first: int, values: Tensor, own: Tensor | None) -> Tensor:
        """Encode whole stored rows from number ``first`` on; what they decode to, fp32.

        Args:
            first: the number of the first.
            values: (n, length) fp32.
            own: U_bb (n, n) fp32, where codes are chosen row by row.
        """

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """All that was encoded, as the codec names it."""


class GroupedEncoder(Encoder):
    """Codes of some bits, and a group's numbers, ``count`` in fp16."""

    def __init__(self, channels: int, length: int, device: torch.device, bits: int, count: int) -> None:
        super().__init__(channels, length, device)
        self.bits = bits
        self.codes = torch.zeros(channels, self.groups, GROUP, dtype=torch.uint8, device=device)
        self.params = torch.zeros(channels, self.groups, count, dtype=torch.float16, device=device)
        self.valid = (torch.arange(self.groups * GROUP, device=device) < length).view(self.groups, GROUP)
        """Which columns are not padding."""
        self.salient = torch.zeros_like(self.valid)
        """Which columns have a table of their own."""

    @abstractmethod
    def fit(self, values: Tensor, first: int, costs: Tensor | None) -> Tensor:
        """The numbers (n, groups, count) fp16.

        Args:
            values: (n, width) fp32, of groups from ``first`` on.
            costs: (width,) of a squared error in each column; ``None`` where all are alike.

        Raises:
            ValueError: a number is not finite in fp16.
        """

    @abstractmethod
    def tables(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """What each code decodes to, in an ordinary and in a salient column: (n, 2^bits) fp32."""

    def block(self, number: int, values: Tensor, costs: Tensor, own: Tensor | None) -> Tensor:
        width = values.shape[1]
        salient = self.salient[None, number]
        params = self.fit(values, number, costs)[:, 0]
        tables = self.tables(params)

        def choose(columns: Tensor, which: slice) -> tuple[Tensor, Tensor]:
            codes, decoded = nearest(columns.t(), *tables, salient[:, which])
            return codes.t(), decoded.t()

        codes, decoded = in_turn(values.t(), own, choose)
        self.codes[:, number, :width], self.params[:, number] = codes.t(), params
        return decoded.t()

    def rows(self, first: int, values: Tensor, own: Tensor | None) -> Tensor:
        n = len(values)
        params = self.fit(values, 0, None)
        once, twice = (table.view(n, self.groups, -1) for table in self.tables(params.flatten(0, 1)))

        def choose(rows: Tensor, which: slice) -> tuple[Tensor, Tensor]:
            tables = once[which].flatten(0, 1), twice[which].flatten(0, 1)
            codes, decoded = nearest(self._flat(rows), *tables, self.salient.repeat(len(rows), 1))
            return codes.view(len(rows), -1), decoded.view(len(rows), -1)[:, : self.length]

        codes, decoded = in_turn(values, own, choose)
        here = slice(first, first + n)
        self.codes[here] = codes.view(n, self.groups, GROUP) * self.valid
        self.params[here] = params
        return decoded

    def _flat(self, rows: Tensor) -> Tensor:
        """The groups of whole rows, (n·groups, 128)."""
        return _padded(rows, self.groups * GROUP).view(-1, GROUP)

    def parts(self) -> dict[str, Tensor]:
        return {"codes": pack_codes(self.codes.flatten(1), self.bits), "params": pack_params(self.params)}


class BillmEncoder(GroupedEncoder):
    """See :mod:`sparselora_dist.codecs.billm`."""

    def __init__(self, channels: int, length: int, device: torch.device) -> None:
        super().__init__(channels, length, device, 2, 7)

    def begin(self, matrix: Tensor, costs: Tensor, across: bool) -> None:
        if across:  # A stored row meets all columns at once: they are chosen before the first.
            padded = _padded(matrix, self.groups * GROUP)
            for number in range(self.groups):
                columns = padded[:, number * GROUP : (number + 1) * GROUP]
                self.salient[number] = salient_columns(columns, costs[:, None], self.valid[number])

    def block(self, number: int, values: Tensor, costs: Tensor, own: Tensor | None) -> Tensor:
        padded = _padded(values, GROUP), _padded(costs, GROUP)[None]
        self.salient[number] = salient_columns(*padded, self.valid[number])
        return super().block(number, values, costs, own)

    def fit(self, values: Tensor, first: int, costs: Tensor | None) -> Tensor:
        n, count = len(values), -(-values.shape[1] // GROUP)
        masks = (mask[first : first + count].repeat(n, 1) for mask in (self.salient, self.valid))
        return fit_groups(_padded(values, count * GROUP).view(-1, GROUP), *masks).view(n, count, -1)

    def tables(self, params: Tensor) -> tuple[Tensor, Tensor]:
        return tables_of(params)

    def parts(self) -> dict[str, Tensor]:
        return super().parts() | {"columns": pack_bits(self.salient.view(1, -1))}


class LevelsEncoder(GroupedEncoder):
    """hqq, bcq and shiftadd: numbers as they are found without data, but for weights of the errors.

    Args:
        quantize: from values (n, width) fp32 and the costs of their columns, or ``None``, to codes and numbers.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        device: torch.device,
        codec: LevelsCodec,
        quantize: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
    ) -> None:
        self.rule = RULES[codec.format]
        super().__init__(channels, length, device, codec.bits, numbers(self.rule, codec.bits))
        self.quantize, self.format = quantize, codec.format
        every = torch.arange(GROUP, device=device).remainder(2**codec.bits).to(torch.uint8)
        self.every_code = pack_codes(every[None], codec.bits)

    def fit(self, values: Tensor, first: int, costs: Tensor | None) -> Tensor:
        params = self.quantize(values, costs)[1]
        if not bool(params.isfinite().all()):
            raise ValueError(
                f"a weight is NaN, Inf or beyond what fp16 numbers can hold, which {self.format} cannot store"
            )
        return params

    def tables(self, params: Tensor) -> tuple[Tensor, Tensor]:
        codes, length = self.every_code.expand(len(params), -1), 2**self.bits
        table = level_rows(
            codes,
            pack_params(params[:, None]),
            None,
            None,
            torch.float32,
            length=length,
            rule=self.rule,
            bits=self.bits,
        )
        return table, table


class Float8Encoder(Encoder):
    """A scale for each stored row: of what it is before its own block is encoded, or before the first."""

    def __init__(self, channels: int, length: int, device: torch.device) -> None:
        super().__init__(channels, length, device)
        self.codes = torch.zeros(channels, length, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(channels, 1, device=device)

    def begin(self, matrix: Tensor, costs: Tensor, across: bool) -> None:
        self.scales = _scales(matrix)

    def block(self, number: int, values: Tensor, costs: Tensor, own: Tensor | None) -> Tensor:
        start = number * GROUP
        codes, decoded = in_turn(values.t(), own, lambda columns, _: _float8(columns, self.scales.t()))
        self.codes[:, start : start + values.shape[1]] = codes.t()
        return decoded.t()

    def rows(self, first: int, values: Tensor, own: Tensor | None) -> Tensor:
        here = slice(first, first + len(values))
        self.scales[here] = scales = _scales(values)
        self.codes[here], decoded = in_turn(values, own, lambda rows, which: _float8(rows, scales[which]))
        return decoded

    def parts(self) -> dict[str, Tensor]:
        return {"rows": self.codes, "scales": self.scales.view(torch.uint8)}


def in_turn(
    values: Tensor, own: Tensor | None, choose: Callable[[Tensor, slice], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Codes (n, ...) uint8 of inputs (n, outputs) fp32 and what they decode to: all at once, or each after what the errors
    before it have made of it.

    Args:
        values: an input a row.
        own: U_bb (n, n), or ``None`` for all at once.
        choose: from inputs, and which they are, to codes and values.
    """
    if own is None:
        return choose(values, slice(0, len(values)))
    values = values.clone(memory_format=torch.contiguous_format)
    chosen = []
    for i in range(len(values)):
        here = slice(i, i + 1)
        chosen.append(choose(values[here], here))
        values[i + 1 :] -= own[i, i + 1 :, None] * ((values[here] - chosen[-1][1]) / own[i, i])
    codes, decoded = zip(*chosen)
    return torch.cat(codes), torch.cat(decoded)


def _scales(rows: Tensor) -> Tensor:
    """(n, 1) fp32, as :class:`FloatsCodec` makes them."""
    return FloatsCodec().encode(rows, 0)["scales"].view(torch.float32)


def _float8(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 and values fp32; what passes the largest that a scale reaches becomes it."""
    codes = (values / scales).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), codes.float() * scales


def _padded(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[-1]))
