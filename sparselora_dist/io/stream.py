"""Fills a model on the meta device from its files, tensor by tensor: this rank's part of each, as its codec stores it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import Codec
from ..codecs.linear import FrozenLinear, FrozenMatrix
from ..layouts import BY_ROWS, DecoderLayer, Experts, placeholder
from ..method.channels import TRANSPOSED
from ..sharding.placement import OtherRankError, Placement, Share
from .bank import MATRICES, BankFiles
from .loftq import KeyedShift
from .manifest import CorruptFileError
from .prequantized import PrequantizedError, StoredBank, stored_codec, stored_matrix
from .prequantized.matrix import REMEDY
from .shard_files import TensorFiles, weight_key

_NO_SHIFT = KeyedShift()
Read = Callable[[str, int, int, int], "Tensor | None"]
"""Of an encoded matrix, by a part's name, all its rows, and the first and last of those that are wanted: these; ``None``
where the files hold nothing like it."""


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor to read."""

    kept: int
    """Bytes of it that this rank keeps."""
    fill: Callable[[], None]


class Stream:
    """Fills a model on the meta device, tensor by tensor."""

    def __init__(
        self,
        checkpoint: TensorFiles,
        codec: Codec,
        dtype: torch.dtype,
        placement: Placement,
        shift: KeyedShift = _NO_SHIFT,
    ) -> None:
        self.checkpoint, self.codec, self.dtype, self.placement = checkpoint, codec, dtype, placement
        self.shift = shift
        self.kept = 0

    # --- the matrices of the decoder layers -----------------------------------------------------------------------

    def matrices(self, layers: list[DecoderLayer]) -> Iterator[Job]:
        for layer in layers:
            for name in layer.names:
                linear: Any = layer.matrix(name)
                parent, own = layer.slot(name)
                key = weight_key(self.checkpoint, f"{layer.path_of(name)}.weight")
                self._check_shape(key, self._shape(key), tuple(linear.weight.shape))
                transposed = name in TRANSPOSED
                codec = stored_codec(self.checkpoint, key, self.codec, self.dtype, transposed=transposed)
                channels, length = tuple(linear.weight.shape)[:: -1 if transposed else 1]
                kept = sum(part.bytes(channels) for part in codec.parts(length).values()) // self.placement.size

                def fill(
                    parent: Any = parent,
                    own: str = own,
                    linear: Any = linear,
                    key: str = key,
                    codec: Codec = codec,
                    transposed: bool = transposed,
                ) -> None:
                    setattr(parent, own, self._frozen(linear, key, codec, transposed))

                yield Job(kept, fill)
            if layer.experts:
                yield from self._experts(layer, layer.experts)

    def _experts(self, layer: DecoderLayer, experts: Experts) -> Iterator[Job]:
        bank, family = BankFiles.of(self.checkpoint, layer), experts.module
        by_rows = family.__dict__.setdefault(BY_ROWS, {})
        like = torch.empty(0, dtype=self.dtype, device=self.placement.device)
        for name in MATRICES:
            found = bank.stored(name)
            codec = bank.codec(found, self.codec, self.dtype)
            self._check_there(f"{bank.path}.{name}", tuple(family._parameters[name].shape))
            channels, widths = bank.channels(name), codec.parts(experts.hidden)
            kept = sum(part.bytes(channels) for part in widths.values()) // self.placement.size

            def fill(
                name: str = name, found: StoredBank | None = found, codec: Codec = codec, channels: int = channels
            ) -> None:
                def encode(start: int, stop: int, share: Share) -> dict[str, Tensor]:
                    return self._encoded(codec, bank.key(name), bank.rows(name, start, stop), start, share)

                parts = self._parts(channels, codec, experts.hidden, encode, found.part if found else None)
                family._parameters[name] = placeholder(tuple(family._parameters[name].shape), like)
                by_rows[name] = FrozenMatrix(codec, parts, experts.hidden)
                by_rows[name].__dict__["placeholder"] = family._parameters[name]

            yield Job(kept, fill)

    def _parts(
        self,
        channels: int,
        codec: Codec,
        length: int,
        encode: Callable[[int, int, Share], dict[str, Tensor]],
        read: Read | None = None,
    ) -> dict[str, nn.Parameter]:
        """This rank's part of a matrix: as ``read`` gives it, where the files hold it encoded, else encoded.

        Args:
            channels, codec, length: of the matrix.
            encode: gives rows ``[start, stop)`` of it.
            read: see :data:`Read`.
        """
        if read and (parts := self._as_they_are(read, codec, channels, length)) is not None:
            return parts
        widths = codec.parts(length)
        row_widths = [part.width for part in widths.values()]
        start, stop = self.placement.rows(channels, row_widths)
        encoded = encode(start, stop, self.placement.share(channels, row_widths))
        return {name: self._keep(encoded[name], start, channels, part.width) for name, part in widths.items()}

    def _keep(self, rows: Tensor, start: int, count: int, width: int) -> nn.Parameter:
        rows = rows.to(self.placement.device)
        self.kept += rows.nbytes
        return self.placement.parameter(rows, start, torch.Size((count, width)))

    def _as_they_are(self, read: Read, codec: Codec, channels: int, length: int) -> dict[str, nn.Parameter] | None:
        """This rank's part of what is encoded, each part by its own rows; ``None`` where it must be encoded anew."""
        parts = {}
        with self.checkpoint.opened():
            for name, part in codec.parts(length).items():
                count = part.rows(channels)
                start, stop = self.placement.rows(count, [part.width])
                rows = read(name, count, start, stop)
                if rows is None:
                    return None
                parts[name] = self._keep(rows, start, count, part.width)
        return parts

    def _frozen(self, linear: nn.Linear, key: str, codec: Codec, transposed: bool) -> FrozenLinear:
        channels, length = tuple(linear.weight.shape)[:: -1 if transposed else 1]

        def encode(start: int, stop: int, share: Share) -> dict[str, Tensor]:
            return self._encoded(codec, key, self._rows(key, start, stop, transposed), start, share)

        def read(name: str, count: int, start: int, stop: int) -> Tensor | None:
            return found.part(name, start, stop, transposed) if found else None

        found = stored_matrix(self.checkpoint, key)
        parts = self._parts(channels, codec, length, encode, read if found else None)
        return FrozenLinear(
            linear.in_features, linear.out_features, linear.bias, codec, parts, transposed=transposed
        ).train(linear.training)

    def _rows(self, key: str, start: int, stop: int, transposed: bool) -> Tensor:
        """Rows of a matrix as it is stored, in values."""
        if found := stored_matrix(self.checkpoint, key):
            return found.columns(start, stop) if transposed else found.rows(start, stop)
        span = slice(start, stop)
        rows = self.checkpoint.read_columns(key, span) if transposed else self.checkpoint.read(key, span)
        return self.shift.rows(key, rows, start, transposed)

    def _encoded(self, codec: Codec, key: str, rows: Tensor, start: int, share: Share) -> dict[str, Tensor]:
        rows = rows.to(self.dtype).contiguous().to(self.placement.device)
        self.checkpoint.check_finite(key, rows)
        try:
            return codec.encode(rows, start, share)
        except OtherRankError:
            raise
        except ValueError as error:
            raise CorruptFileError(f"{key} of {self.checkpoint.folder}: {error}") from error

    # --- embedding, LM head, norms, biases ------------------------------------------------------------------------

    def others(self, model: nn.Module, layers: list[DecoderLayer], whole: Callable[[str], bool]) -> Iterator[Job]:
        tied = model.config.tie_word_embeddings and model.get_output_embeddings() is not None
        head = model.get_output_embeddings() if tied else None
        names = {module: path for path, module in model.named_modules()}
        # What PEFT copies from the LM head is the embedding where the two are tied.
        also = {names[model.get_input_embeddings()]: names[head]} if tied else {}
        matrices = {id(layer.matrix(name)) for layer in layers for name in layer.names}
        banks = {id(layer.experts.module) for layer in layers if layer.experts}
        for path, module in model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                stored = (id(module) in matrices and name == "weight") or (id(module) in banks and name in MATRICES)
                if parameter.device.type != "meta" or stored:
                    continue
                if module is head and name == "weight":
                    yield Job(0, lambda: self._tie(model))
                    continue
                self._check_plain(f"{path}.{name}".lstrip("."))
                self._check_there(f"{path}.{name}".lstrip("."), tuple(parameter.shape))
                copied = whole(path) or whole(also.get(path, path))
                kept = parameter.numel() * self.dtype.itemsize // (1 if copied else self.placement.size)

                def fill(
                    path: str = path, name: str = name, shape: torch.Size = parameter.shape, copied: bool = copied
                ) -> None:
                    parameter = self._parameter(f"{path}.{name}".lstrip("."), shape, copied)
                    model.get_submodule(path).register_parameter(name, parameter)

                yield Job(kept, fill)
        saved = model.state_dict()
        for path, buffer in list(model.named_buffers()):
            if path in saved:  # A router's correction of its scores, a layer's scale.
                key = weight_key(self.checkpoint, path)
                self._check_shape(key, self.checkpoint.tensors[key].shape, tuple(buffer.shape))
                yield Job(buffer.nbytes, partial(self._fill_buffer, path, buffer))

    def _parameter(self, name: str, shape: torch.Size, whole: bool) -> nn.Parameter:
        placement = Placement(self.placement.device) if whole else self.placement
        start, stop = placement.rows(shape[0], [shape[1:].numel()])
        if name in self.checkpoint.stacks:
            key = self.checkpoint.stacks[name].keys[0][0]
            rows = self.checkpoint.stacks[name].read(self.checkpoint, slice(start, stop))
        else:
            key = weight_key(self.checkpoint, name)
            # An LM head may be quantised with the rest: it is kept in values.
            found = stored_matrix(self.checkpoint, key)
            rows = found.rows(start, stop) if found else self.checkpoint.read(key, slice(start, stop))
        rows = rows.to(self.placement.device, self.dtype)
        self.checkpoint.check_finite(key, rows)
        self.kept += rows.nbytes
        return placement.parameter(rows, start, shape)

    def _fill_buffer(self, name: str, buffer: Tensor) -> None:
        key = weight_key(self.checkpoint, name)
        values = self.checkpoint.read(key)
        self.checkpoint.check_finite(key, values)
        buffer.copy_(values)

    @staticmethod
    def _tie(model: Any) -> None:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight

    def _check_plain(self, name: str) -> None:
        stack = self.checkpoint.stacks.get(name)
        if stack and (coded := stack.coded(self.checkpoint)):
            raise PrequantizedError(
                f"{coded[0]} of {self.checkpoint.folder} is quantised: experts that are not sparse here are read in bf16, "
                f"fp16 or fp32. {REMEDY}"
            )

    def _check_there(self, name: str, want: tuple[int, ...]) -> None:
        if name not in self.checkpoint.stacks:
            key = weight_key(self.checkpoint, name)
            self._check_shape(key, self._shape(key), want)

    def _shape(self, key: str) -> tuple[int, ...]:
        found = stored_matrix(self.checkpoint, key)
        return found.shape if found else self.checkpoint.tensors[key].shape

    def _check_shape(self, key: str, have: tuple[int, ...], want: tuple[int, ...]) -> None:
        if tuple(have) != tuple(want):
            raise CorruptFileError(
                f"{key} of {self.checkpoint.folder} has shape {tuple(have)}, but config.json asks for {tuple(want)}: the "
                "files belong to different models"
            )
