"""Where the frozen matrices come from: safetensors files read slice by slice, or a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..codecs import Codec
from ..codecs.linear import FrozenLinear, FrozenMatrix
from ..layouts import BY_ROWS, DecoderLayer, Experts, Rows, causal_lm, decoder_layers, matrix_name
from ..method.channels import EXPERTS
from ..sharding.parameters import full_tensor
from .bank import BankFiles
from .loftq import KeyedShift
from .prequantized import stored_codec, stored_matrix
from .shard_files import TensorFiles, digest, spaced, weight_key


def checkpoint_folder(name_or_path: str) -> Path:
    """The folder itself, or the hub's snapshot of a model's safetensors files, downloaded if need be."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import snapshot_download

    # Some repositories hold the weights again, in folders or under other names.
    patterns = ["model*.safetensors", "*.json"]
    return Path(snapshot_download(name_or_path, allow_patterns=patterns, ignore_patterns=["*/*"]))


def fingerprint(weight: Tensor) -> str:
    """Short hash of a strided sample of a matrix."""
    return digest(spaced(weight), tuple(weight.shape))


def _count(rows: Rows | None, stored: int) -> int:
    """How many ``rows`` are of a matrix of ``stored``."""
    if rows is None:
        return stored
    return len(range(stored)[rows]) if isinstance(rows, slice) else len(rows)


def _part_mark(mark: str, name: str, rows: Rows | None) -> str:
    """The mark of a matrix inside the stored one that ``mark`` is of."""
    return mark if rows is None else f"{mark}:{name}"


class WeightSource(Protocol):
    """Gives frozen matrices by layer and name, as they are computed with."""

    collective: bool
    """Whether every rank must ask for the same matrix at the same time (sharded weights)."""

    dtype: torch.dtype
    """Of the matrices."""

    def get(self, layer: int, name: str) -> Tensor:
        """The whole matrix (out, in), for example ``get(3, "gate_proj")``."""
        ...

    def shape(self, layer: int, name: str) -> tuple[int, int]:
        """(out, in) of the matrix, without reading it."""
        ...

    def blocks(self, layer: int, name: str) -> int:
        """How many matrices stand in it one below another: the experts of a mixture."""
        ...

    def mark(self, layer: int, name: str) -> str:
        """A short name of the matrix's content; equal marks mean equal matrices."""
        ...


class ModelWeights:
    """The matrices of a model in memory, gathered one at a time where an engine has sharded them."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = decoder_layers(model)
        # Every rank holds its own copy of an unsharded model; a gather of shards needs all of them.
        self.collective = True
        lm: Any = causal_lm(model)
        self.dtype: torch.dtype = lm.get_input_embeddings().weight.dtype

    def get(self, layer: int, name: str) -> Tensor:
        """Raises ValueError where the weight is not there: a rank that fails here alone is seen by its launcher."""
        if name in EXPERTS:
            return _there(self._bank(layer, name), layer, name)
        stored, rows = self._layers[layer].within(name)
        weight = self._stored(layer, stored)
        return weight if rows is None else weight[rows]

    def _stored(self, layer: int, name: str) -> Tensor:
        linear: Any = self._layers[layer].matrix(name)
        if isinstance(linear, FrozenLinear):
            weight = linear.matrix([full_tensor(part) for part in linear.parts], self.dtype)
        else:
            weight = full_tensor(linear.weight)
        return _there(weight, layer, name)

    def shape(self, layer: int, name: str) -> tuple[int, int]:
        if name in EXPERTS:
            experts = self._experts(layer)
            return experts.count * experts.width, experts.hidden
        stored, rows = self._layers[layer].within(name)
        linear: Any = self._layers[layer].matrix(stored)
        return _count(rows, linear.out_features), linear.in_features

    def blocks(self, layer: int, name: str) -> int:
        return self._experts(layer).count if name in EXPERTS else 1

    def _experts(self, layer: int) -> Experts:
        experts = self._layers[layer].experts
        assert experts is not None, f"layers.{layer} has no experts"
        return experts

    def _bank(self, layer: int, name: str) -> Tensor:
        """Of all experts, one after another, gate or up: (E·W, H)."""
        experts = self._experts(layer)
        module: Any = experts.module
        stored: Any = module.__dict__.get(BY_ROWS, {}).get("gate_up_proj", module.gate_up_proj)
        if isinstance(stored, FrozenMatrix):
            rows = stored.rows_of([full_tensor(part) for part in stored.parts], self.dtype)
        else:
            rows = experts.gate_up_rows(full_tensor(stored))
        return rows.view(experts.count, 2, experts.width, -1)[:, EXPERTS.index(name)].flatten(0, 1)

    def mark(self, layer: int, name: str) -> str:
        if name in EXPERTS:
            return fingerprint(self.get(layer, name))
        stored, rows = self._layers[layer].within(name)
        return _part_mark(fingerprint(self._stored(layer, stored)), name, rows)


def _there(weight: Tensor, layer: int, name: str) -> Tensor:
    if weight.is_meta:
        raise ValueError(
            f"layers.{layer}.{name} is on the meta device, and the estimator's factors are made of it: load the weights "
            "on every rank before apply_sparselora (cpu_ram_efficient_loading of FSDP may keep them on one: turn it off)"
        )
    return weight


_NO_SHIFT = KeyedShift()


class CheckpointWeights:
    """The matrices of a checkpoint as a codec stores them, read one at a time by whoever asks.

    ``layers`` say what the files call them; without, that is what Llama's do.
    """

    collective = False

    def __init__(
        self,
        checkpoint: TensorFiles,
        codec: Codec,
        dtype: torch.dtype,
        layers: Sequence[DecoderLayer] = (),
        shift: KeyedShift = _NO_SHIFT,
    ) -> None:
        self.checkpoint, self.codec, self.dtype, self.shift = checkpoint, codec, dtype, shift
        self._paths = {(layer.index, name): layer.path_of(name) for layer in layers for name in layer.names}
        self._layers = {layer.index: layer for layer in layers}
        self._banks = {layer.index: BankFiles.of(checkpoint, layer) for layer in layers if layer.experts}

    def get(self, layer: int, name: str) -> Tensor:
        if name in EXPERTS:
            return self._banks[layer].scored(name, self.codec, self.dtype)
        key, rows = self._find(layer, name)
        if found := stored_matrix(self.checkpoint, key):
            weight = found.rows(0, found.shape[0]).to(self.dtype)
        else:
            value = self.shift.rows(key, self.checkpoint.read(key))
            weight = self._codec_of(key).roundtrip(value.to(self.dtype))
        return weight if rows is None else weight[rows]

    def shape(self, layer: int, name: str) -> tuple[int, int]:
        if name in EXPERTS:
            layout = self._banks[layer].layout
            return layout.count * layout.width, layout.hidden
        key, rows = self._find(layer, name)
        found = stored_matrix(self.checkpoint, key)
        count, columns = found.shape if found else self.checkpoint.tensors[key].shape
        return _count(rows, count), columns

    def blocks(self, layer: int, name: str) -> int:
        return self._banks[layer].layout.count if name in EXPERTS else 1

    def mark(self, layer: int, name: str) -> str:
        if name in EXPERTS:
            return self._banks[layer].mark(name, self.codec, self.dtype)
        key, rows = self._find(layer, name)
        if found := stored_matrix(self.checkpoint, key):
            mark = found.mark()
        else:
            sample = digest(self.checkpoint.sample(key).to(self.dtype), self.checkpoint.tensors[key].shape)
            mark = self._codec_of(key).mark + self.shift.mark(key) + sample
        return _part_mark(mark, name, rows)

    def _find(self, layer: int, name: str) -> tuple[str, Rows | None]:
        """The key of the stored matrix that the matrix ``name`` is in, and its rows there."""
        stored, rows = self._layers[layer].within(name) if layer in self._layers else (name, None)
        return self._key(layer, stored), rows

    def _key(self, layer: int, name: str) -> str:
        path = self._paths.get((layer, name)) or f"model.{matrix_name(layer, name)}"
        return weight_key(self.checkpoint, f"{path}.weight")

    def _codec_of(self, key: str) -> Codec:
        return stored_codec(self.checkpoint, key, self.codec, self.dtype)
