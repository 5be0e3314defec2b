"""Quantise a model, layer by layer: what goes into each, its codes, and what it then makes of the sequences for the next.

Every rank holds one layer and its own sequences; the matrices of a layer are dealt to the ranks. The result does not depend
on their number: see :mod:`sparselora_dist.layerwise.statistics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ..apply.loftq import AdaptedMatrix, adapted_matrices
from ..codecs import Codec, codec_named
from ..config import ConfigError, LoraSection, ModelSection, QuantizationSection
from ..io.model_folder import QUANTIZATION_FILE
from ..io.prequantized.own import FORMATS, config_section, part_keys, tensors_of
from ..io.shard_files import read_json
from ..layerwise.growing import GrowingModel
from ..layerwise.layer_stream import Call
from ..layerwise.model_files import ModelFiles
from ..layerwise.statistics import Inputs, deal, gather, parts_of, sharers
from ..layouts import DecoderLayer
from ..method.channels import TRANSPOSED
from ..method.loftq import Pair
from ..sync.everyone import everyone
from .compensation import Compensate
from .matrix import Calibrated, Made, decoded, needs_data, quantized, with_adapter
from .start import GrowingAdapter


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantizing:
    """What is asked for.

    ``data`` is what ``data.train`` takes; ``sequences`` of ``length`` tokens are cut from it (length None: 2048, or as many
    as the model has positions).
    """

    model: str
    format: str
    output: Path
    bits: int | None = None
    """``None``: what ``quantization.bits`` is then."""
    compensate: str | None = None
    """``None``: exact with data, none without."""
    data: str | None = None
    sequences: int = 128
    length: int | None = None
    loftq: LoraSection | None = None
    """The adapter that is to start over the model, by LoftQ."""


@torch.no_grad()
def quantize(asked: Quantizing, device: torch.device | None = None) -> dict[str, Any]:
    """Write the quantised model; its record, which is ``quantization.json`` there. A collective of all ranks.

    Started again with the same it goes on after the last layer that is written.

    Raises:
        ConfigError: a format, data or a number that cannot be used.
        ValueError, OSError: the model cannot be read or is quantised, a value cannot be stored, or the output is there.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    codec, bits, how = _check(asked)
    source = ModelFiles.open(asked.model, device or torch.device("cpu"))
    stream = source.stream
    for layer in stream.layers:
        if not layer.names:
            raise ConfigError(f"{layer.path} of {asked.model} has no matrices that a run would store in few bits")
    record: dict[str, Any] = {"model": asked.model, "format": asked.format, "bits": bits, "compensate": how}
    record["dtype"] = source.dtype
    adapted: dict[str, AdaptedMatrix] = {}
    if asked.loftq:
        record["loftq"] = asked.loftq.to_dict()
        section = ModelSection(name_or_path=asked.model, dtype=source.dtype)  # type: ignore[arg-type]
        adapted = {matrix.module: matrix for matrix in adapted_matrices(section, asked.loftq, source.files)}
    work = _Layers(source, codec, asked, how, adapted, rank, ranks)
    if asked.data is not None:
        calibration = source.sequences(asked.data, asked.sequences, asked.length)
        count, length = calibration.sequences.shape
        record |= {"data": asked.data, "tokens": calibration.mark, "sequences": count, "length": length}
        work.embed(calibration.sequences)
    growing = None
    if rank == 0:
        growing = GrowingModel(
            asked.output.absolute(), source.files, record, len(stream.layers), record_file=QUANTIZATION_FILE
        )
    done = everyone(growing.done if growing else 0)[0] if ranks > 1 else growing.done if growing else 0
    left = stream.layers if done < len(stream.layers) else []
    with tqdm(left, "quantizing", unit="layer", disable=None if rank == 0 else True) as bar:
        for layer in bar:
            work.layer(layer, growing, written=layer.index < done)
    if growing:
        if asked.loftq:
            GrowingAdapter(growing.folder).finish(asked.loftq, bits, growing.output)
        error = "of the outputs" if asked.data else "of the weights"
        growing.note(
            error=f"{error}, under the adapter" if asked.loftq else error, bits_per_weight=work.bits_per_weight()
        )
        growing.finish(read_json(source.folder / "config.json"), config_section(asked.format, bits))
    if ranks > 1:
        dist.barrier()
    return read_json(asked.output.absolute() / QUANTIZATION_FILE)


def _check(asked: Quantizing) -> tuple[Codec, int, Compensate]:
    if asked.format not in FORMATS:
        raise ConfigError(f"--format is {asked.format!r}: allowed: {', '.join(FORMATS)}")
    try:
        section = QuantizationSection(format=asked.format, bits=asked.bits)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"--format {asked.format}, --bits {asked.bits}: {error}") from error
    codec = codec_named(cast("Any", asked.format), section.width)
    how = asked.compensate or ("none" if asked.data is None else "exact")
    if how not in get_args(Compensate):
        raise ConfigError(f"--compensate is {how!r}: allowed: {', '.join(get_args(Compensate))}")
    if asked.data is None and needs_data(codec):
        raise ConfigError(f"--format {asked.format} looks at activations: give --data")
    if asked.data is None and how != "none":
        raise ConfigError(f"--compensate {how} looks at activations: give --data")
    if asked.loftq:
        asked.loftq.check_bits(f"--format {asked.format} stores", section.width)
    if asked.sequences < 1 or (asked.length is not None and asked.length < 2):
        raise ConfigError(
            f"--sequences {asked.sequences} and --length {asked.length}: allowed: integers from 1 and from 2"
        )
    return codec, section.width, cast("Compensate", how)


class _Layers:
    def __init__(
        self,
        source: ModelFiles,
        codec: Codec,
        asked: Quantizing,
        how: Compensate,
        adapted: Mapping[str, AdaptedMatrix],
        rank: int,
        ranks: int,
    ) -> None:
        self.source, self.stream, self.codec, self.how = source, source.stream, codec, how
        self.adapted, self.rounds = adapted, asked.loftq.loftq_rounds if asked.loftq else 0
        self.rank, self.ranks = rank, ranks
        self.data = asked.data is not None
        # Ranks that have no sequences know no sums.
        self.workers = sharers(asked.sequences, ranks) if self.data else ranks
        self.hidden: list[Tensor] = []
        """Of this rank's sequences, what the next layer is given."""
        self.calls = [Call((), {})] * len(self.stream.layers)
        self.parts: list[range] = []
        self.tokens = 0

    def embed(self, sequences: Tensor) -> None:
        """Take this rank's sequences of all (n, length)."""
        self.parts = parts_of(len(sequences), self.rank, self.ranks)
        numbers = [number for part in self.parts for number in part]
        # What layers are called with is asked of one sequence at least.
        self.hidden, self.calls = self.stream.embed(sequences[numbers or [0]])
        self.hidden = self.hidden[: len(numbers)]
        self.tokens = sequences.numel()

    def layer(self, layer: DecoderLayer, growing: GrowingModel | None, *, written: bool) -> None:
        """Quantise a layer, or take it as it was written before, and run the sequences through it."""
        if written and not self.data:
            return
        linears: dict[str, Any] = {name: layer.matrix(name) for name in layer.names}
        keys = {name: self._key(layer, name) for name in linears}
        with self.stream.filled(layer) as names:
            if written:
                made, owners = self._read(layer, growing, linears, keys), dict.fromkeys(linears, 0)
            else:
                made, owners = self._quantize(layer, linears)
            tensors: dict[str, Tensor] = {}
            errors: dict[str, float] = {}
            pairs: dict[str, Pair] = {}
            for name, linear in linears.items():
                shape, transposed, adapted = tuple(linear.weight.shape), name in TRANSPOSED, self._adapted(layer, name)
                one = self._share(made.pop(name, None), shape, transposed, adapted, owners[name])
                errors[keys[name]] = one.error
                tensors |= tensors_of(keys[name], self.codec, one.parts, shape, transposed) if growing else {}
                rows = decoded(self.codec, one.parts, shape[0 if transposed else 1], linear.weight.dtype)
                linear.weight.data = rows.t().contiguous() if transposed else rows
                if adapted and one.pair:
                    pairs[adapted.module] = one.pair
                    linear.weight.data = with_adapter(linear.weight.data, one.pair, adapted.scaling)
            if growing and not written:
                if pairs:
                    GrowingAdapter(growing.folder).add(layer.index, pairs)
                others = {names[own]: p.detach() for own, p in layer.module.named_parameters()}
                tensors = {key: value for key, value in others.items() if key not in keys.values()} | tensors
                tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
                growing.add(layer.index, tensors, errors)
            for place, hidden in enumerate(self.hidden):
                self.hidden[place] = self.stream.run(layer, hidden, self.calls[layer.index])

    def _key(self, layer: DecoderLayer, name: str) -> str:
        return self.stream.key(layer, layer.path_of(name).removeprefix(f"{layer.path}.") + ".weight")

    def _adapted(self, layer: DecoderLayer, name: str) -> AdaptedMatrix | None:
        return self.adapted.get(layer.path_of(name))

    def _quantize(self, layer: DecoderLayer, linears: dict[str, nn.Linear]) -> tuple[dict[str, Made], dict[str, int]]:
        """This rank's matrices; and which rank has which."""
        inputs = self._inputs(layer, linears)
        owners = deal({name: linear.weight.shape for name, linear in linears.items()}, self.workers)
        made = {}
        for name, linear in linears.items():
            products = gather(inputs, name, owners[name]) if self.data else None
            if self.rank == owners[name]:
                try:
                    made[name] = quantized(
                        linear.weight,
                        self.codec,
                        name in TRANSPOSED,
                        Calibrated(products, self.tokens, self.how),
                        self._adapted(layer, name),
                        self.rounds,
                    )
                except ValueError as error:
                    raise ValueError(f"{layer.path_of(name)}: {error}") from error
        return made, owners

    def _inputs(self, layer: DecoderLayer, linears: dict[str, nn.Module]) -> Inputs:
        inputs = Inputs(linears, "products" if self.data else "")
        place = 0
        for part in self.parts:
            inputs.begin_part()
            for _ in part:
                self.stream.run(layer, self.hidden[place], self.calls[layer.index])
                place += 1
        inputs.close()
        return inputs

    def _read(
        self, layer: DecoderLayer, growing: GrowingModel | None, linears: dict[str, nn.Linear], keys: dict[str, str]
    ) -> dict[str, Made]:
        """On the rank that writes, the parts of a layer that was written."""
        if growing is None:
            return {}
        held, made = growing.layer(layer.index), {}
        modules = [adapted.module for name in linears if (adapted := self._adapted(layer, name))]
        pairs = GrowingAdapter(growing.folder).layer(layer.index, modules)
        for name, linear in linears.items():
            length = linear.weight.shape[0 if name in TRANSPOSED else 1]
            found = part_keys(keys[name], self.codec, length)
            parts = {part: held[key].to(self.stream.device) for part, key in found.items()}
            pair = pairs.get(layer.path_of(name))
            made[name] = Made(parts, pair=pair and (pair[0].to(self.stream.device), pair[1].to(self.stream.device)))
        return made

    def _share(
        self,
        made: Made | None,
        shape: tuple[int, ...],
        transposed: bool,
        adapted: AdaptedMatrix | None,
        owner: int,
    ) -> Made:
        """A matrix (out, in) that rank ``owner`` has made, on every rank. A collective."""
        device = self.stream.device
        if made is None:
            channels, length = shape[::-1] if transposed else shape
            sizes = {name: (part.rows(channels), part.width) for name, part in self.codec.parts(length).items()}
            parts = {name: torch.empty(size, dtype=torch.uint8, device=device) for name, size in sizes.items()}
            sides = ((adapted.rank, shape[1]), (shape[0], adapted.rank)) if adapted else None
            made = Made(
                parts, pair=sides and (torch.empty(sides[0], device=device), torch.empty(sides[1], device=device))
            )
        if self.ranks == 1:
            return made
        parts = {name: part.contiguous() for name, part in made.parts.items()}
        pair = made.pair and (made.pair[0].contiguous(), made.pair[1].contiguous())
        told = torch.tensor([made.error], dtype=torch.float64, device=device)
        for tensor in (*parts.values(), *(pair or ()), told):
            dist.broadcast(tensor, owner)
        return Made(parts, told.item(), pair)

    def bits_per_weight(self) -> float:
        """Of all matrices, everything that is stored of them."""
        stored = weights = 0
        for layer in self.stream.layers:
            for name in layer.names:
                linear: Any = layer.matrix(name)
                channels, length = linear.weight.shape[:: -1 if name in TRANSPOSED else 1]
                stored += sum(part.bytes(channels) for part in self.codec.parts(length).values())
                weights += channels * length
        return round(8 * stored / weights, 4)
