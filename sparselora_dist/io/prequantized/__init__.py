"""Checkpoints whose matrices are encoded already: who encoded them is one file each behind :class:`StoredMatrix`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ...codecs import Codec, FloatsCodec, PlainCodec, codec_of
from ...config import ModelSection, QuantizationSection
from ..shard_files import FLOATS, TensorFiles
from . import bitsandbytes, compressed_tensors, fine_grained, modelopt, own
from .bank import StoredBank
from .family import Family, Planned, quantization_settings
from .matrix import REMEDY, PrequantizedError, StoredMatrix

READERS: tuple[Any, ...] = (bitsandbytes, own, compressed_tensors.READER, modelopt.READER, fine_grained.READER)
"""Each has ``find(checkpoint, key) -> StoredMatrix | None``, ``is_quantised(checkpoint)`` and
``check_config(settings, codec, at) -> bool``: whether a ``quantization_config`` is its own; raises PrequantizedError."""


@lru_cache(maxsize=8)
def stored_matrix(checkpoint: TensorFiles, key: str) -> StoredMatrix | None:
    """The matrix, if it is encoded.

    Raises:
        PrequantizedError: it is, in a form that is not read, or nothing says in which.
        CorruptFileError: what belongs to it is missing, or has another shape.
    """
    if found := next((found for reader in READERS if (found := reader.find(checkpoint, key))), None):
        return found
    held = checkpoint.tensors.get(key)
    if held is None or held.dtype not in FLOATS:
        raise PrequantizedError(
            f"{key} of {checkpoint.folder} is stored as {held.dtype if held else 'packed codes'}, and no "
            f"quantization_config that is read says what these mean (docs/formats.md). {REMEDY}"
        )
    return None


def stored_codec(
    checkpoint: TensorFiles, key: str, codec: Codec, dtype: torch.dtype, *, transposed: bool = False
) -> Codec:
    """How a matrix is stored: by the run's codec, but plain where a quantised checkpoint left it as it was.

    Raises:
        PrequantizedError: it is quantised in another way than the run asks for.
    """
    if found := stored_matrix(checkpoint, key):
        return found.codec(codec, transposed)
    return PlainCodec(dtype) if is_quantised(checkpoint) else codec


@lru_cache(maxsize=8)
def is_quantised(checkpoint: TensorFiles) -> bool:
    """Whether any of its matrices is encoded, in a form that is read.

    Raises:
        PrequantizedError: its config says that they are, in a form that is not.
    """
    return any(reader.is_quantised(checkpoint) for reader in READERS)


def all_as_they_are(checkpoint: TensorFiles, asked: Codec) -> bool:
    """Whether a run that asks for the codec ``asked`` encodes nothing of it: small floats are read, and what their maker
    left as it was stays so, experts too."""
    return isinstance(asked, FloatsCodec) and is_quantised(checkpoint)


def check_quantization_config(config: Any, codec: Codec, name: str) -> None:
    """Refuse quantised checkpoints that are not read, or that the run did not ask for.

    Raises:
        PrequantizedError: the key of the checkpoint's config is named.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        settings = settings if isinstance(settings, dict) else settings.to_dict()
        _check(settings, codec, f"the checkpoint {name} (quantization_config in its config.json)")


def check_quantization_files(folder: Path, codec: Codec) -> None:
    """The same of a folder whose config says nothing, which another file of it may do."""
    if (settings := quantization_settings(folder)) is not None:
        _check(settings, codec, f"the checkpoint {folder}")


def planned(
    folder: Path, model: ModelSection, asked: QuantizationSection
) -> tuple[QuantizationSection, Planned] | None:
    """What a run on the checkpoint in a folder stores, by its config alone; ``None`` where it is not quantised.

    Raises:
        PrequantizedError: see :func:`check_quantization_config`.
    """
    settings, at = quantization_settings(folder), f"the checkpoint {folder}"
    if settings is None:
        return None
    asked = own.with_stored_bits(asked, settings)
    codec = codec_of(model, asked)
    for family in (reader for reader in READERS if isinstance(reader, Family)):
        if settings.get("quant_method") in family.methods:
            found = family.planned(settings, codec, at)
            return (asked, found) if found else None
    _check(settings, codec, at)
    return asked, lambda module, transposed: codec


def _check(settings: dict[str, Any], codec: Codec, at: str) -> None:
    if not any(reader.check_config(settings, codec, at) for reader in READERS):
        raise PrequantizedError(
            f"{at} is quantised by {settings.get('quant_method')!r}: read are bitsandbytes' 4-bit NF4, and fp8, nvfp4 and "
            "mxfp4 by compressed-tensors, ModelOpt and Transformers (docs/formats.md). Use the bf16 checkpoint with "
            "quantization.load_in_4bit true"
        )


__all__ = [
    "READERS",
    "PrequantizedError",
    "StoredBank",
    "StoredMatrix",
    "all_as_they_are",
    "bitsandbytes",
    "check_quantization_config",
    "check_quantization_files",
    "is_quantised",
    "planned",
    "stored_codec",
    "stored_matrix",
]
