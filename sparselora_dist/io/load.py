"""The base model, streamed: each rank reads, encodes and keeps only its own part of every frozen tensor."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig

from ..codecs import Codec, codec_of
from ..codecs.linear import FrozenLinear
from ..config.quantization import QuantizationSection
from ..config.run import ModelSection
from ..layouts import DecoderLayer, check_known, check_config, decoder_layers
from ..method.channels import TRANSPOSED
from ..sharding.placement import OtherRankError, Placement
from .manifest import CorruptFileError
from .memory import check_fits, peak_bytes, trim_heap
from .prequantized import check_quantization_config, prequantized, stored_codec
from .pretrained import read_config, read_tokenizer
from .shard_files import TensorFiles
from .stored_names import Stack, find_names
from .weights import CheckpointWeights, checkpoint_folder, weight_key

log = logging.getLogger(__name__)

# Tensors between returns of freed memory: about a decoder layer.
_TRIM_EVERY = 7


def load_tokenizer(section: ModelSection) -> Any:
    """The model's tokenizer; code from the checkpoint is never run."""
    return read_tokenizer(section.name_or_path)


def check_model(section: ModelSection) -> Any:
    """The model's config, refused early where the family is not supported."""
    config = read_config(section.name_or_path)
    check_config(config)
    return config


def frozen_codec(section: ModelSection, quantization: QuantizationSection) -> Codec:
    """:func:`codec_of` the run, if it can be used here.

    Raises:
        ValueError: 4-bit without bitsandbytes.
    """
    if quantization.load_in_4bit and find_spec("bitsandbytes") is None:
        raise ValueError(
            "quantization.load_in_4bit needs bitsandbytes, which is not installed: pip install "
            "'sparselora-dist[quantization]'"
        )
    return codec_of(section, quantization)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading took on this rank."""

    seconds: float
    kept_bytes: int
    """Of frozen weights, this rank's part."""
    host_peak_bytes: int
    device_peak_bytes: int


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A frozen base model."""

    model: Any
    weights: CheckpointWeights
    """Its matrices, for the estimator's factors."""
    report: LoadReport


def load_base(
    section: ModelSection,
    quantization: QuantizationSection,
    placement: Placement,
    *,
    whole: Callable[[str], bool] = lambda name: False,
    local_ranks: int = 1,
    progress: bool = False,
) -> LoadedBase:
    """Build the model without weights and fill it from its safetensors files. Every rank must call it.

    All matrices of the decoder layers become :class:`FrozenLinear`; everything else keeps its module.

    Args:
        section, quantization: what is loaded, and how it is stored.
        placement: this rank's part.
        whole: names of modules that every rank needs whole, because PEFT copies them.
        local_ranks: ranks that share this host's memory.
        progress: show a bar.

    Raises:
        FileNotFoundError, CorruptFileError, PrequantizedError, InsufficientMemoryError, UnsupportedModelError: before
            anything is kept; a value that is not finite, or a file that changes meanwhile, when it is read.
        OtherRankError: another rank raised one of these.
    """
    started = time.perf_counter()
    # Ranks read different parts, of files that may be their hosts' own: what one of them finds wrong must end all.
    with placement.together():
        config = check_model(section)
        codec, dtype = frozen_codec(section, quantization), getattr(torch, section.dtype)
        check_quantization_config(config, codec, section.name_or_path)
        config.__dict__.pop("quantization_config", None)
        checkpoint = TensorFiles.of_model(checkpoint_folder(section.name_or_path))
        model = _without_weights(config, dtype, section.attn_implementation)
        model.requires_grad_(False)
        layers = decoder_layers(model)
        check_known(model, layers)
        checkpoint.renamed, stacks = find_names(model, checkpoint)
        stream = _Stream(checkpoint, codec, dtype, placement, stacks)
        jobs = [*stream.matrices(layers), *stream.others(model, layers, whole)]
        check_fits(sum(job.kept for job in jobs), placement.home, local_ranks, placement.rank)
    with placement.together(), tqdm(jobs, "loading", disable=not progress, leave=False, unit="tensor") as bar:
        for number, job in enumerate(bar):
            job.fill()
            if number % _TRIM_EVERY == 0:
                trim_heap()
    for module in model.modules():  # Rotary frequencies; parameters are where they belong already.
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(placement.device)
    model.config.use_cache = False
    model.eval()
    try:
        model.generation_config = GenerationConfig.from_pretrained(section.name_or_path)
    except OSError:
        log.debug("%s has no generation_config.json", section.name_or_path)
    report = LoadReport(time.perf_counter() - started, stream.kept, *peak_bytes(placement.device))
    return LoadedBase(model, CheckpointWeights(checkpoint, codec, dtype, layers), report)


def _without_weights(config: Any, dtype: torch.dtype, implementation: str | None) -> Any:
    """The model with its parameters on the meta device. One whose family has no SDPA gets the family's own attention."""
    with init_empty_weights(include_buffers=False):
        try:
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=implementation, trust_remote_code=False
            )
        except ValueError:
            if implementation != "sdpa":
                raise
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="eager", trust_remote_code=False
            )


@dataclass(frozen=True, slots=True)
class _Job:
    """One tensor to read."""

    kept: int
    """Bytes of it that this rank keeps."""
    fill: Callable[[], None]


class _Stream:
    """Fills a model on the meta device, tensor by tensor."""

    def __init__(
        self,
        checkpoint: TensorFiles,
        codec: Codec,
        dtype: torch.dtype,
        placement: Placement,
        stacks: dict[str, Stack],
    ) -> None:
        self.checkpoint, self.codec, self.dtype, self.placement = checkpoint, codec, dtype, placement
        self.stacks = stacks
        self.kept = 0

    # --- the matrices of the decoder layers -----------------------------------------------------------------------

    def matrices(self, layers: list[DecoderLayer]) -> Iterator[_Job]:
        for layer in layers:
            for name in layer.names:
                linear: Any = layer.matrix(name)
                parent, own = layer.slot(name)
                key = weight_key(self.checkpoint, f"{layer.path_of(name)}.weight")
                found = prequantized(self.checkpoint, key)
                shape = found.shape if found else self.checkpoint.tensors[key].shape
                self._check_shape(key, shape, tuple(linear.weight.shape))
                codec = stored_codec(self.checkpoint, key, self.codec, self.dtype)
                transposed = name in TRANSPOSED
                channels, length = tuple(linear.weight.shape)[:: -1 if transposed else 1]
                kept = channels * sum(part.row_bytes for part in codec.parts(length).values()) // self.placement.size

                def fill(
                    parent: Any = parent,
                    own: str = own,
                    linear: Any = linear,
                    key: str = key,
                    codec: Codec = codec,
                    transposed: bool = transposed,
                ) -> None:
                    setattr(parent, own, self._frozen(linear, key, codec, transposed))

                yield _Job(kept, fill)

    def _frozen(self, linear: nn.Linear, key: str, codec: Codec, transposed: bool) -> FrozenLinear:
        channels, length = tuple(linear.weight.shape)[:: -1 if transposed else 1]
        widths = codec.parts(length)
        row_widths = [part.width for part in widths.values()]
        start, stop = self.placement.rows(channels, row_widths)
        encoded = self._encode(key, codec, start, stop, transposed, self.placement.share(channels, row_widths))
        parts = {}
        for name, part in widths.items():
            rows = encoded[name].to(self.placement.device)
            parts[name] = self.placement.parameter(rows, start, torch.Size((channels, part.width)))
            self.kept += rows.nbytes
        return FrozenLinear(
            linear.in_features, linear.out_features, linear.bias, codec, parts, transposed=transposed
        ).train(linear.training)

    def _encode(
        self, key: str, codec: Codec, start: int, stop: int, transposed: bool, share: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        found = prequantized(self.checkpoint, key)
        if found and not transposed:
            return found.encoded(start, stop)
        if found:  # Blocks run along the stored rows: down and o are quantised again in the other direction.
            rows = found.columns(start, stop)
        elif transposed:
            rows = self.checkpoint.read_columns(key, slice(start, stop))
        else:
            rows = self.checkpoint.read(key, slice(start, stop))
        rows = rows.to(self.dtype).contiguous().to(self.placement.device)
        self.checkpoint.check_finite(key, rows)
        try:
            return codec.encode(rows, start, share)
        except OtherRankError:
            raise
        except ValueError as error:
            raise CorruptFileError(f"{key} of {self.checkpoint.folder}: {error}") from error

    # --- embedding, LM head, norms, biases ------------------------------------------------------------------------

    def others(self, model: nn.Module, layers: list[DecoderLayer], whole: Callable[[str], bool]) -> Iterator[_Job]:
        tied = model.config.tie_word_embeddings and model.get_output_embeddings() is not None
        head = model.get_output_embeddings() if tied else None
        names = {module: path for path, module in model.named_modules()}
        # What PEFT copies from the LM head is the embedding where the two are tied.
        also = {names[model.get_input_embeddings()]: names[head]} if tied else {}
        matrices = {id(layer.matrix(name)) for layer in layers for name in layer.names}
        for path, module in model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.device.type != "meta" or (id(module) in matrices and name == "weight"):
                    continue
                if module is head and name == "weight":
                    yield _Job(0, lambda: self._tie(model))
                    continue
                self._check_there(f"{path}.{name}".lstrip("."), tuple(parameter.shape))
                copied = whole(path) or whole(also.get(path, path))
                kept = parameter.numel() * self.dtype.itemsize // (1 if copied else self.placement.size)

                def fill(
                    path: str = path, name: str = name, shape: torch.Size = parameter.shape, copied: bool = copied
                ) -> None:
                    parameter = self._parameter(f"{path}.{name}".lstrip("."), shape, copied)
                    model.get_submodule(path).register_parameter(name, parameter)

                yield _Job(kept, fill)
        saved = model.state_dict()
        for path, buffer in list(model.named_buffers()):
            if path in saved:  # A router's correction of its scores, a layer's scale.
                self._check_there(path, tuple(buffer.shape))
                yield _Job(buffer.nbytes, lambda path=path, buffer=buffer: self._fill_buffer(path, buffer))

    def _parameter(self, name: str, shape: torch.Size, whole: bool) -> nn.Parameter:
        placement = Placement(self.placement.device) if whole else self.placement
        start, stop = placement.rows(shape[0], [shape[1:].numel()])
        if name in self.stacks:
            key = self.stacks[name].keys[0][0]
            rows = self.stacks[name].read(self.checkpoint, slice(start, stop))
        else:
            key = weight_key(self.checkpoint, name)
            rows = self.checkpoint.read(key, slice(start, stop))
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

    def _check_there(self, name: str, want: tuple[int, ...]) -> None:
        if name not in self.stacks:
            key = weight_key(self.checkpoint, name)
            self._check_shape(key, self.checkpoint.tensors[key].shape, want)

    def _check_shape(self, key: str, have: tuple[int, ...], want: tuple[int, ...]) -> None:
        if tuple(have) != tuple(want):
            raise CorruptFileError(
                f"{key} of {self.checkpoint.folder} has shape {tuple(have)}, but config.json asks for {tuple(want)}: the "
                "files belong to different models"
            )
