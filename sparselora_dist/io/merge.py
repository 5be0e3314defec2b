"""Merge a LoRA adapter into its base model offline, shard by shard.

    merged = base + scaling · (B @ A)    in fp32, rounded once

``base`` is what training saw: the checkpoint's weights, or what storage in few bits makes of them. An adapter that was
trained under the zeros of a pruned model says so, and its sum is zero wherever ``base`` is.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..codecs import Codec, codec_named
from ..config.quantization import Format, QuantizationSection
from .loftq import KEY as LOFTQ
from .manifest import publish
from .marker import KEY
from .merge_4bit import FourBit
from .merge_adapter import CONFIG_FILE, Adapter
from .merge_base import BaseWeights
from .model_folder import PRUNING_FILE, copy_companions, output_config, save_tensors, write_json
from .prequantized.own import with_stored_bits
from .shard_files import INDEX_FILE, read_json

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeSummary:
    """What a merge has written."""

    output: Path
    files: int
    """Weight files."""
    size: int
    """Bytes of all tensors."""
    merged: int
    """Matrices that a LoRA delta was added to."""
    masked: int
    """Those of them that are zero wherever the base is."""
    replaced: int
    """Tensors that the adapter holds whole (``modules_to_save``, biases)."""
    dequantized: int
    """Matrices that are what storage in few bits makes of them."""
    dtype: str
    """Of what is not in 4 bits."""
    quantized: int
    """Matrices that are written in 4 bits."""

    def __str__(self) -> str:
        words = [f"merged {self.merged} matrices"]
        words += [f"kept the zeros of {self.masked} matrices"] if self.masked else []
        words += [f"replaced {self.replaced} tensors"] if self.replaced else []
        words += [f"dequantised {self.dequantized} matrices"] if self.dequantized else []
        words += [f"quantised {self.quantized} matrices to nf4"] if self.quantized else []
        files = "1 file" if self.files == 1 else f"{self.files} files"
        return f"wrote {self.output}: {files}, {self.size / 1e9:.3g} GB in {self.dtype}; {', '.join(words)}"


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: str = "bfloat16",
    load_in_4bit: bool = False,
    format: Format | None = None,
    bits: int | None = None,
    save_in_4bit: bool = False,
    double_quant: bool = True,
) -> MergeSummary:
    """Write the base model with the adapter merged into it, in the base's own shard layout.

    Everything is checked before anything is written; ``output`` appears whole, or not at all. Tensors are read one at a
    time and at most one output shard is held.

    Args:
        base: a local model folder in safetensors; bf16, fp16, fp32, or quantised as a run reads it (bitsandbytes'
            nf4, fp8, nvfp4, mxfp4), which is dequantised.
        adapter: a folder that PEFT wrote.
        output: must not exist.
        dtype: of the result, and what training computed in: ``bfloat16``, ``float32`` or ``float16``.
        load_in_4bit: the adapter was trained with ``quantization.load_in_4bit``; the same as ``format`` "nf4".
        format, bits: ``quantization.format`` and ``.bits`` that it was trained with. An adapter that LoftQ started says so
            itself.
        save_in_4bit: write the linears' weights in NF4, as bitsandbytes quantises the merged model in ``dtype``.
        double_quant: that run's ``quantization.bnb_4bit_use_double_quant``, and that of the output in 4 bits.

    Raises:
        ConfigError: a format or a number of bits that is not one.
        ValueError, OSError: see :class:`BaseWeights`, :class:`Adapter` and :class:`FourBit`; an output that exists or does
            not fit on the disk; a result that is not finite; an adapter that was trained under zeros which the base does
            not have; another format than the adapter says.
    """
    base, adapter, output = Path(base), Path(adapter), Path(output).absolute()
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"{output} exists already: choose another output, or remove it")
    if not adapter.is_dir():
        raise FileNotFoundError(f"--adapter {adapter} is not a folder")
    lora = Adapter(adapter)
    section: dict[str, Any] = {"load_in_4bit": load_in_4bit, "format": format, "bits": bits}
    asked = QuantizationSection(**section, bnb_4bit_use_double_quant=double_quant)
    weights = BaseWeights(base, _codec(_stored_bits(asked, base), lora), DTYPES[dtype], lora.shift)
    has_head = weights.head in weights.shapes
    lora.resolve(weights.shapes if has_head else {**weights.shapes, weights.head: weights.shapes[weights.embedding]})
    four_bit = FourBit(weights, double_quant, DTYPES[dtype]) if save_in_4bit else None
    untied = _resolve_tied(weights, lora, has_head)
    _check_zeros(weights, lora)
    _warn_about_another_base(weights, lora)
    return _write(weights, lora, output, dtype, untied, four_bit)


def _stored_bits(asked: QuantizationSection, base: Path) -> QuantizationSection:
    """With those of a base that was quantised here, where nobody says how many."""
    config = base / "config.json"
    return with_stored_bits(asked, read_json(config).get("quantization_config")) if config.is_file() else asked


def _codec(asked: QuantizationSection, lora: Adapter) -> Codec | None:
    """How training stored the base: as the adapter says where LoftQ started it, else as is asked for."""
    said = lora.stored
    if said is None:
        double = asked.bnb_4bit_use_double_quant
        return codec_named(asked.stored, asked.width, double_quant=double) if asked.stored else None
    if asked.stored and (asked.stored, asked.width) != (said.format, said.bits):
        raise ValueError(
            f"{lora.folder / CONFIG_FILE}: {LOFTQ!r} says that the adapter was trained on a base in {said}, but "
            f"{asked.stored} of {asked.width} bits is asked for: leave --format and --load-in-4bit out"
        )
    return codec_named(said.format, said.bits, double_quant=said.double_quant)


def _resolve_tied(weights: BaseWeights, lora: Adapter, has_head: bool) -> bool:
    """Whether the output's LM head is no longer the embedding, because the adapter has trained one of them alone."""
    head, embedding = weights.head, weights.embedding
    if not weights.tied or not (lora.touches(head) or lora.touches(embedding)):
        return False
    if has_head:
        raise ValueError(
            f"{weights.folder}: config.json says 'tie_word_embeddings', but the files hold {head!r} too, and the adapter "
            "changes one of them: it is not clear which one it was trained on"
        )
    keys = [lora.replaced[name] for name in (embedding, head) if name in lora.replaced]
    same = len(keys) == 2 and torch.equal(lora.files.get(keys[0]), lora.files.get(keys[1]))
    if head not in lora.deltas and (lora.config.ensure_weight_tying or same):
        if len(keys) == 2 and not same:
            raise ValueError(f"{lora.path}: 'ensure_weight_tying' is true, but {keys[0]!r} and {keys[1]!r} differ")
        lora.replaced[embedding] = keys[0]
        lora.replaced.pop(head, None)
        return False
    weights.untie()
    return True


def _check_zeros(weights: BaseWeights, lora: Adapter) -> None:
    """Refuse a base that is not pruned where the adapter says that it is."""
    for name in sorted(lora.masked):
        if (share := weights.zeros(name)) < weights.least_zeros(name):
            raise ValueError(
                f"{lora.folder / CONFIG_FILE}: {KEY!r} says that the adapter was trained under the zeros of "
                f"{name.removesuffix('.weight')!r}, but {share:.2%} of that matrix of {weights.folder} are zero: it is not "
                "the pruned model. Give that one as --base"
            )
    if (weights.folder / PRUNING_FILE).is_file() and lora.deltas and not lora.masked:
        log.warning(
            "%s is a pruned model, and the adapter %s was not trained under its zeros (no %r in %s): they are filled",
            weights.folder, lora.folder, KEY, CONFIG_FILE,
        )  # fmt: skip


def _warn_about_another_base(weights: BaseWeights, lora: Adapter) -> None:
    trained_on = str(lora.config.base_model_name_or_path or "")
    # The name of the folder, or the folder of the hub's cache: models--org--name/snapshots/<revision>.
    names = {weights.folder.resolve().name, *weights.folder.absolute().parts}
    if trained_on and not names & {Path(trained_on).name, "models--" + trained_on.replace("/", "--")}:
        log.warning(
            "the adapter %s was trained on %r, the base is %s: the shapes fit, but is it the same model?",
            lora.folder, trained_on, weights.folder,
        )  # fmt: skip


def _write(
    weights: BaseWeights, lora: Adapter, output: Path, dtype: str, untied: bool, four_bit: FourBit | None
) -> MergeSummary:
    target = DTYPES[dtype]
    names = list(weights.shapes)
    output.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(_size(weights, name, target, four_bit) for name in names)
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise OSError(f"{output.parent} has {free} bytes free, the merged model needs {needed}")
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    weight_map: dict[str, str] = {}
    size = 0
    try:
        temporary.mkdir()
        for file, members in tqdm(weights.shards.items(), desc="merging", unit="shard", disable=None):
            shard = _shard(weights, lora, members, target, four_bit)
            save_tensors(shard, temporary / file)
            weight_map |= dict.fromkeys(shard, file)
            size += sum(tensor.nbytes for tensor in shard.values())
            del shard
        if weights.files.sharded:
            total = {"total_parameters": sum(math.prod(shape) for shape in weights.shapes.values()), "total_size": size}
            write_json({"metadata": total, "weight_map": weight_map}, temporary / INDEX_FILE)
        config = output_config(weights.raw_config, dtype, untied)
        if four_bit:
            config["quantization_config"] = four_bit.section
        write_json(config, temporary / "config.json")
        copy_companions(weights.folder, temporary)
        record = weights.folder / PRUNING_FILE
        if record.is_file() and lora.masked >= {name for name in lora.deltas if name.endswith(".weight")}:
            shutil.copyfile(record, temporary / PRUNING_FILE)  # It tells the truth of the output still.
        if output.exists():
            raise FileExistsError(f"{output} was made by something else meanwhile")
        publish(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return MergeSummary(
        output=output,
        files=len(weights.shards),
        size=size,
        merged=sum(len(delta.keys) == 2 for delta in lora.deltas.values()),
        masked=len(lora.masked),
        replaced=len(lora.replaced),
        dequantized=sum(weights.dequantized(name) and name not in lora.replaced for name in names),
        dtype=dtype,
        quantized=len(four_bit.names) if four_bit else 0,
    )


def _shard(
    weights: BaseWeights, lora: Adapter, members: list[str], target: torch.dtype, four_bit: FourBit | None
) -> dict[str, Tensor]:
    """All tensors of a file of the output."""
    shard: dict[str, Tensor] = {}
    for name in members:
        value = _merged(weights, lora, name, target)
        shard |= four_bit.tensors(name, value) if four_bit else {name: value}
    return shard


def _size(weights: BaseWeights, name: str, target: torch.dtype, four_bit: FourBit | None) -> int:
    """Bytes on the disk, about where they are in 4 bits."""
    if four_bit and (size := four_bit.bytes_of(name, weights.shapes[name])) is not None:
        return size
    itemsize = target.itemsize if weights.is_float(name) else weights.files.get(name).dtype.itemsize
    return math.prod(weights.shapes[name]) * itemsize


def _merged(weights: BaseWeights, lora: Adapter, name: str, target: torch.dtype) -> Tensor:
    """One tensor of the output."""
    replacement, kept = lora.replaced.get(name), None
    if replacement is not None:
        value = lora.files.get(replacement)
    elif name in lora.masked:
        value, kept = weights.masked(name)
    else:
        value = weights.get(name)
    if not weights.is_float(name):
        return value.contiguous()
    result = lora.add(name, value)
    if kept is not None:
        result.masked_fill_(kept.logical_not(), 0.0)
    result = result.to(target).contiguous()
    # The extremes are NaN where any value is; unlike isfinite() they take no memory.
    if result.numel() and not all(extreme.isfinite() for extreme in result.aminmax()):
        raise ValueError(
            f"{name!r} holds NaN or Inf after merging in {target}: the base or the adapter is broken, or the dtype's range "
            "is too small"
        )
    return result
