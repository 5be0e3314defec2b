"""The base model, streamed: each rank reads, encodes and keeps only its own part of every frozen tensor."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import init_empty_weights
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig

from ..codecs import Codec, codec_of
from ..config.quantization import FOREIGN, READ_ONLY, QuantizationSection
from ..config.run import ModelSection
from ..layouts import check_known, check_text, decoder_layers
from ..sharding.placement import Placement
from .loftq import Shift
from .memory import check_fits, peak_bytes, trim_heap
from .prequantized import PrequantizedError, check_quantization_config, check_quantization_files, is_quantised
from .prequantized.own import with_stored_bits
from .pretrained import read_config, read_tokenizer
from .shard_files import TensorFiles
from .stored_names import find_names
from .stream import Stream
from .weights import CheckpointWeights, checkpoint_folder

log = logging.getLogger(__name__)

# Tensors between returns of freed memory: about a decoder layer.
_TRIM_EVERY = 7


def load_tokenizer(section: ModelSection) -> Any:
    """The model's tokenizer; code from the checkpoint is never run."""
    return read_tokenizer(section.name_or_path)


def check_model(section: ModelSection) -> Any:
    """The model's config, refused early where the family is not supported."""
    config = read_config(section.name_or_path)
    check_text(config)
    return config


def frozen_codec(section: ModelSection, quantization: QuantizationSection) -> Codec:
    """:func:`codec_of` the run, if it can be used here.

    Raises:
        ValueError: 4-bit without bitsandbytes.
    """
    if quantization.stored == "nf4" and find_spec("bitsandbytes") is None:
        raise ValueError(
            'quantization.format "nf4" (load_in_4bit) needs bitsandbytes, which is not installed: pip install '
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
    shift: Shift | None = None,
    local_ranks: int = 1,
    progress: bool = False,
) -> LoadedBase:
    """Build the model without weights and fill it from its safetensors files. Every rank must call it.

    All matrices of the decoder layers become :class:`FrozenLinear`; everything else keeps its module.

    Args:
        section, quantization: what is loaded, and how it is stored.
        placement: this rank's part.
        whole: names of modules that every rank needs whole, because PEFT copies them.
        shift: what LoftQ subtracts from matrices before they are stored.
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
        quantization = with_stored_bits(quantization, getattr(config, "quantization_config", None))
        codec, dtype = frozen_codec(section, quantization), getattr(torch, section.dtype)
        check_quantization_config(config, codec, section.name_or_path)
        said = config.__dict__.pop("quantization_config", None)
        checkpoint = TensorFiles.of_model(checkpoint_folder(section.name_or_path))
        if said is None:
            check_quantization_files(checkpoint.folder, codec)
        model = model_without_weights(config, dtype, section.attn_implementation)
        model.requires_grad_(False)
        layers = decoder_layers(model)
        check_known(model, layers)
        find_names(model, checkpoint)
        keyed = (shift or Shift()).by_key(checkpoint)
        stream = Stream(checkpoint, codec, dtype, placement, keyed)
        jobs = [*stream.matrices(layers), *stream.others(model, layers, whole)]
        if not is_quantised(checkpoint):
            check_made(quantization, section.name_or_path)
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
    return LoadedBase(model, CheckpointWeights(checkpoint, codec, dtype, layers, keyed), report)


def check_made(quantization: QuantizationSection, name: str) -> None:
    """Raises PrequantizedError for a format that must be in the files, of a checkpoint that holds plain weights."""
    if quantization.stored not in READ_ONLY:
        return
    foreign = quantization.stored in FOREIGN
    how = "name a checkpoint that is" if foreign else "'sparselora-dist quantize' makes such a checkpoint"
    raise PrequantizedError(
        f"'quantization.format' is \"{quantization.stored}\", which is read from a checkpoint that holds it, never made "
        f"when a model is loaded, and {name} is not quantised: {how}, or use a format that is made on load (docs/formats.md)"
    )


def model_without_weights(config: Any, dtype: torch.dtype, implementation: str | None) -> Any:
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
