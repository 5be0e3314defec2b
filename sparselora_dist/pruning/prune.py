"""Prune a model, layer by layer: statistics of its inputs, zeros, and what it then makes of them for the next layer.

Every rank holds one layer and its own sequences; the matrices of a layer are dealt to the ranks. The result does not depend
on their number: see :mod:`.statistics`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ..config import ConfigError
from ..io.pretrained import check_positions, read_config, read_tokenizer
from ..io.shard_files import TensorFiles, read_json
from ..io.weights import checkpoint_folder
from ..layouts import DecoderLayer
from ..sync.everyone import everyone
from .calibration import read_sequences
from .criteria import METHODS, Method
from .layer_stream import Call, LayerStream
from .output import GrowingModel
from .pattern import Pattern
from .statistics import PARTS, Inputs, gather, parts_of

log = logging.getLogger(__name__)

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruning:
    """What is asked for.

    ``data`` is what ``data.train`` takes, None for magnitude; ``sequences`` of ``length`` tokens are cut from it (length
    None: 2048, or as many as the model has positions).
    """

    model: str
    method: str
    pattern: Pattern
    output: Path
    data: str | None = None
    sequences: int = 128
    length: int | None = None


def prune(asked: Pruning, device: torch.device | None = None) -> dict[str, Any]:
    """Write the pruned model; its record, which is ``pruning.json`` there. A collective of all ranks.

    Started again with the same it goes on after the last layer that is written.

    Raises:
        ConfigError: a method, data or a number that cannot be used; more ranks than share the sequences.
        ValueError, OSError: the model cannot be read or is quantised, the pattern does not divide its rows, or the output
            is there.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    method = _check(asked, ranks)
    device = device or torch.device("cpu")
    folder = checkpoint_folder(asked.model)
    config = read_config(str(folder))
    if getattr(config, "quantization_config", None):
        raise ConfigError(f"--model {asked.model} is quantised: prune the weights that it was made from")
    files = TensorFiles.of_model(folder)
    dtype = _dtype(files)
    stream = LayerStream(config, files, getattr(torch, dtype), device)
    for layer in stream.layers:
        for name, linear in stream.linears(layer).items():
            asked.pattern.check(linear.in_features, f"{layer.path}.{name}")
    record: dict[str, Any] = {
        "model": asked.model,
        "method": asked.method,
        "pattern": str(asked.pattern),
        "dtype": dtype,
    }
    hidden: list[Tensor] = []
    calls = [Call((), {})] * len(stream.layers)
    parts: list[range] = []
    if method.statistic:
        assert asked.data is not None
        length = asked.length or min(2048, getattr(config, "max_position_embeddings", 2048))
        check_positions(config, length)
        calibration = read_sequences(asked.data, read_tokenizer(str(folder)), asked.sequences, length)
        record |= {"data": asked.data, "tokens": calibration.mark, "sequences": asked.sequences, "length": length}
        parts = parts_of(asked.sequences, rank, ranks)
        mine = calibration.sequences[parts[0].start : parts[-1].stop] if parts else calibration.sequences[:0]
        hidden, calls = stream.embed(mine)
    growing = GrowingModel(asked.output.absolute(), files, record, len(stream.layers)) if rank == 0 else None
    done = everyone(growing.done if growing else 0)[0] if ranks > 1 else growing.done if growing else 0
    work = _Layers(stream, method, asked, hidden, calls, parts, rank, ranks)
    with tqdm(stream.layers, "pruning", unit="layer", disable=None if rank == 0 else True) as bar:
        for layer in bar:
            if layer.index < done:
                work.follow(layer, growing)
            else:
                work.prune(layer, growing)
    if growing:
        growing.finish(read_json(folder / "config.json"))
    if ranks > 1:
        dist.barrier()
    return read_json(asked.output.absolute() / "pruning.json")


def _check(asked: Pruning, ranks: int) -> Method:
    if asked.method not in METHODS:
        raise ConfigError(f"--method is {asked.method!r}: allowed: {', '.join(METHODS)}")
    method = METHODS[asked.method]
    if method.statistic and asked.data is None:
        raise ConfigError(f"--method {asked.method} looks at activations: give --data")
    if asked.sequences < 1 or (asked.length is not None and asked.length < 2):
        raise ConfigError(
            f"--sequences {asked.sequences} and --length {asked.length}: allowed: integers from 1 and from 2"
        )
    if method.statistic and ranks > (most := min(PARTS, asked.sequences)):
        raise ConfigError(f"{asked.sequences} sequences are shared by at most {most} ranks, {ranks} were started")
    return method


def _dtype(files: TensorFiles) -> str:
    matrices = {info.dtype for info in files.tensors.values() if len(info.shape) == 2}
    if len(matrices) != 1 or (only := next(iter(matrices))) not in _DTYPES:
        raise ConfigError(
            f"{files.folder} has matrices of {', '.join(sorted(matrices))}: allowed: one of {', '.join(_DTYPES)}"
        )
    return _DTYPES[only]


@dataclass(slots=True)
class _Layers:
    stream: LayerStream
    method: Method
    asked: Pruning
    hidden: list[Tensor]
    """Of this rank's sequences, what the next layer is given."""
    calls: list[Call]
    parts: list[range]
    rank: int
    ranks: int

    def follow(self, layer: DecoderLayer, growing: GrowingModel | None) -> None:
        """A layer that was written before: only what it makes of the sequences."""
        with self.stream.filled(layer, growing.layer(layer.index) if growing else None):
            for linear in self.stream.linears(layer).values():
                self._share(linear.weight, 0)
            self._advance(layer)

    def prune(self, layer: DecoderLayer, growing: GrowingModel | None) -> None:
        with self.stream.filled(layer) as keys:
            linears = self.stream.linears(layer)
            inputs = Inputs(linears, self.method.statistic)
            place = 0
            for part in self.parts:
                inputs.begin_part()
                for _ in part:
                    self.stream.run(layer, self.hidden[place], self.calls[layer.index])
                    place += 1
            inputs.close()
            owners = deal({name: linear.weight.shape for name, linear in linears.items()}, self.ranks)
            for name, linear in linears.items():
                statistic = gather(inputs, name, owners[name]) if self.method.statistic else None
                if self.rank == owners[name]:
                    self._put_zeros(linear, statistic, f"{layer.path}.{name}")
            zeros = {}
            for name, linear in linears.items():
                self._share(linear.weight, owners[name])
                zeros[name] = (linear.weight == 0).double().mean().item()
            self._advance(layer)
            if growing:
                values = {keys[name]: p.detach().cpu().contiguous() for name, p in layer.module.named_parameters()}
                growing.add(layer.index, values, zeros)

    @torch.no_grad()
    def _put_zeros(self, linear: nn.Linear, statistic: Tensor | None, name: str) -> None:
        asked = self.asked
        tokens = asked.sequences * (self.hidden[0].shape[1] if self.hidden else 0)
        try:
            pruned = self.method.prune(linear.weight.float(), statistic, tokens, asked.pattern)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        linear.weight.copy_(pruned)

    def _share(self, weight: Tensor, owner: int) -> None:
        if self.ranks > 1:
            dist.broadcast(weight.data, owner)

    def _advance(self, layer: DecoderLayer) -> None:
        for place, hidden in enumerate(self.hidden):
            self.hidden[place] = self.stream.run(layer, hidden, self.calls[layer.index])


def deal(shapes: dict[str, torch.Size], ranks: int) -> dict[str, int]:
    """Which rank prunes which matrix: the costliest first, each to who has least."""
    load = [0] * ranks
    owners = {}
    for name in sorted(shapes, key=lambda name: -shapes[name][0] * shapes[name][1] ** 2):
        owners[name] = load.index(min(load))
        load[owners[name]] += shapes[name][0] * shapes[name][1] ** 2
    return owners
