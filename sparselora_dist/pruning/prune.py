"""Prune a model, layer by layer: statistics of its inputs, zeros, and what it then makes of them for the next layer.

Every rank holds one layer and its own sequences; the matrices of a layer are dealt to the ranks. The result does not depend
on their number: see :mod:`.statistics`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ..config import ConfigError
from ..io.model_folder import PRUNING_FILE
from ..io.shard_files import TensorFiles, read_json
from ..io.weights import checkpoint_folder
from ..layerwise.growing import GrowingModel
from ..layerwise.layer_stream import Call
from ..layerwise.statistics import Inputs, deal, gather, parts_of, sharers
from ..layouts import DecoderLayer
from ..sync.everyone import everyone
from .criteria import METHODS, Method
from .distance import Reference
from .pattern import Pattern
from .source import Source


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruning:
    """What is asked for.

    ``data`` is what ``data.train`` takes, None for magnitude; ``sequences`` of ``length`` tokens are cut from it (length
    None: 2048, or as many as the model has positions).
    """

    model: str
    method: str
    pattern: Pattern
    """Of all layers, or their mean where ``layer_sparsity`` is given."""
    output: Path
    data: str | None = None
    sequences: int = 128
    length: int | None = None
    layer_sparsity: tuple[float, ...] | None = None
    """A share of zeros of each layer."""
    adapter: Path | None = None
    """On the model: zeros are chosen of the merged weights, and what is written is the model without it again, and in
    ``adapter`` the same adapter, marked as under these zeros."""
    reference: str | None = None
    """A model of the same names: how far the layers' outputs are from its is written down, as ``errors``."""


def prune(asked: Pruning, device: torch.device | None = None) -> dict[str, Any]:
    """Write the pruned model; its record, which is ``pruning.json`` there. A collective of all ranks.

    Started again with the same it goes on after the last layer that is written.

    Raises:
        ConfigError: a method, data or a number that cannot be used.
        ValueError, OSError: the model cannot be read or is quantised, the pattern does not divide its rows, or the output
            is there.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    method = _check(asked)
    source = Source.of(asked.model, asked.adapter, device or torch.device("cpu"))
    stream = source.stream
    patterns = _patterns(asked, len(stream.layers))
    for layer, pattern in zip(stream.layers, patterns):
        for name, linear in stream.linears(layer).items():
            pattern.check(linear.in_features, f"{layer.path}.{name}")
    record: dict[str, Any] = {"model": asked.model, "method": asked.method, "pattern": str(asked.pattern)}
    record["dtype"] = source.dtype
    if asked.layer_sparsity:
        record["layer_sparsity"] = list(asked.layer_sparsity)
    if source.adapter:
        record |= {"adapter": str(asked.adapter), "adapter_sha256": source.adapter.sha256}
    work = _Layers(source, method, asked, patterns, rank, ranks)
    if asked.data is not None and (method.statistic or asked.reference):
        calibration = source.sequences(asked.data, asked.sequences, asked.length)
        count, length = calibration.sequences.shape
        record |= {"data": asked.data, "tokens": calibration.mark, "sequences": count, "length": length}
        work.embed(calibration.sequences)
    if asked.reference:
        record["reference"] = asked.reference
        files = TensorFiles.of_model(checkpoint_folder(asked.reference))
        work.reference = Reference(stream, files, work.hidden)
    growing = GrowingModel(asked.output.absolute(), source.files, record, len(stream.layers)) if rank == 0 else None
    done = everyone(growing.done if growing else 0)[0] if ranks > 1 else growing.done if growing else 0
    with tqdm(stream.layers, "pruning", unit="layer", disable=None if rank == 0 else True) as bar:
        for layer in bar:
            if layer.index < done:
                work.follow(layer, growing)
            else:
                work.prune(layer, growing)
    if growing:
        if source.adapter:
            keys = [
                key for layer in stream.layers for *_, key in source.adapted(layer) if patterns[layer.index].sparsity
            ]
            source.adapter.save(growing.folder / "adapter", growing.output, keys)
        growing.finish(read_json(source.folder / "config.json"))
    if ranks > 1:
        dist.barrier()
    return read_json(asked.output.absolute() / PRUNING_FILE)


def _check(asked: Pruning) -> Method:
    if asked.method not in METHODS:
        raise ConfigError(f"--method is {asked.method!r}: allowed: {', '.join(METHODS)}")
    method = METHODS[asked.method]
    if method.statistic and asked.data is None:
        raise ConfigError(f"--method {asked.method} looks at activations: give --data")
    if asked.reference and asked.data is None:
        raise ConfigError("outputs are compared with a reference's on data: give --data")
    if asked.sequences < 1 or (asked.length is not None and asked.length < 2):
        raise ConfigError(
            f"--sequences {asked.sequences} and --length {asked.length}: allowed: integers from 1 and from 2"
        )
    return method


def read_shares(path: Path) -> tuple[float, ...]:
    """A sparsity of each layer, from a file that holds a JSON list.

    Raises:
        ConfigError: it does not hold one.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"--layer-sparsity {path} is not JSON: {error}") from error
    if not isinstance(found, list) or not found or not all(type(share) in (int, float) for share in found):
        raise ConfigError(
            f"--layer-sparsity {path}: expected a list with a number for each layer, such as [0.48, 0.52]"
        )
    return tuple(map(float, found))


def _patterns(asked: Pruning, layers: int) -> list[Pattern]:
    """One a layer."""
    shares = asked.layer_sparsity
    if shares is None:
        return [asked.pattern] * layers
    if asked.pattern.of:
        raise ConfigError(f"layers have a sparsity of their own, which pattern {asked.pattern} leaves no room for")
    if len(shares) != layers:
        raise ConfigError(f"{len(shares)} layers are given a sparsity, {asked.model} has {layers}")
    if wrong := [share for share in shares if not 0 <= share < 1]:
        raise ConfigError(f"a layer's sparsity is {wrong[0]}: allowed: numbers from 0 to below 1")
    return [Pattern(share) for share in shares]


class _Layers:
    def __init__(
        self, source: Source, method: Method, asked: Pruning, patterns: list[Pattern], rank: int, ranks: int
    ) -> None:
        self.source, self.stream, self.method, self.asked = source, source.stream, method, asked
        self.patterns, self.rank, self.ranks = patterns, rank, ranks
        # Ranks that have no sequences know no sums.
        self.workers = sharers(asked.sequences, ranks) if method.statistic else ranks
        self.hidden: list[Tensor] = []
        """Of this rank's sequences, what the next layer is given."""
        self.calls = [Call((), {})] * len(self.stream.layers)
        self.parts: list[range] = []
        self.tokens = 0
        self.reference: Reference | None = None

    def embed(self, sequences: Tensor) -> None:
        """Take this rank's sequences of all (n, length)."""
        self.parts = parts_of(len(sequences), self.rank, self.ranks)
        numbers = [number for part in self.parts for number in part]
        # What layers are called with is asked of one sequence at least.
        self.hidden, self.calls = self.stream.embed(sequences[numbers or [0]])
        self.hidden = self.hidden[: len(numbers)]
        self.tokens = sequences.numel()

    def follow(self, layer: DecoderLayer, growing: GrowingModel | None) -> None:
        """A layer that was written before: only what it makes of the sequences."""
        with self.stream.filled(layer, growing.layer(layer.index) if growing else None):
            for linear in self.stream.linears(layer).values():
                self._share(linear.weight, 0)
            self._advance(layer)
        if self.reference:
            self.reference.advance(layer, self.calls[layer.index])

    def prune(self, layer: DecoderLayer, growing: GrowingModel | None) -> None:
        keys = self.stream.keys(layer)
        zeros, values = {}, {}
        with self.source.merged(layer) as stored:
            linears = self.stream.linears(layer)
            inputs = self._inputs(layer, linears)
            owners = deal({name: linear.weight.shape for name, linear in linears.items()}, self.workers)
            for name, linear in linears.items():
                statistic = gather(inputs, name, owners[name]) if self.method.statistic else None
                if self.rank == owners[name]:
                    self._put_zeros(layer, name, linear, statistic, stored.get(name))
            for name, linear in linears.items():
                self._share(linear.weight, owners[name])
                zeros[name] = (linear.weight == 0).double().mean().item()
            if growing:
                # As they are stored: the adapter is put onto them next.
                values = {keys[name]: p.detach().cpu().contiguous() for name, p in layer.module.named_parameters()}
            self._advance(layer)
        error = None
        if self.reference:
            self.reference.advance(layer, self.calls[layer.index])
            error = self.reference.error(self.hidden, self.parts, 0)
        if growing:
            growing.add(layer.index, values, zeros, error)

    def _inputs(self, layer: DecoderLayer, linears: dict[str, nn.Linear]) -> Inputs:
        inputs = Inputs(linears, self.method.statistic)
        place = 0
        for part in self.parts if self.method.statistic else ():
            inputs.begin_part()
            for _ in part:
                self.stream.run(layer, self.hidden[place], self.calls[layer.index])
                place += 1
        inputs.close()
        return inputs

    @torch.no_grad()
    def _put_zeros(
        self, layer: DecoderLayer, name: str, linear: nn.Linear, statistic: Tensor | None, stored: Tensor | None
    ) -> None:
        """``stored`` is what the files have where the linear has an adapter in it."""
        key = self.stream.key(layer, f"{name}.weight")
        adapter = self.source.adapter
        merged = linear.weight.float() if stored is None or adapter is None else adapter.merged(key, stored)
        try:
            pruned = self.method.prune(merged, statistic, self.tokens, self.patterns[layer.index])
        except ValueError as error:
            raise ValueError(f"{layer.path}.{name}: {error}") from error
        if stored is not None and adapter is not None:
            pruned = adapter.without(key, pruned, stored)
        linear.weight.copy_(pruned)

    def _share(self, weight: Tensor, owner: int) -> None:
        if self.ranks > 1:
            dist.broadcast(weight.data, owner)

    def _advance(self, layer: DecoderLayer) -> None:
        self.source.put_adapter(layer)
        for place, hidden in enumerate(self.hidden):
            self.hidden[place] = self.stream.run(layer, hidden, self.calls[layer.index])
