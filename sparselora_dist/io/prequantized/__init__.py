"""Checkpoints whose matrices are encoded already: who encoded them is one file each behind :class:`StoredMatrix`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ...codecs import Codec, PlainCodec
from ..shard_files import TensorFiles
from . import bitsandbytes, own
from .matrix import PrequantizedError, StoredMatrix

READERS = (bitsandbytes, own)
"""Each has ``find(checkpoint, key) -> StoredMatrix | None``, ``is_quantised(checkpoint)`` and
``check_config(settings, codec, at) -> bool``: whether a ``quantization_config`` is its own; raises PrequantizedError."""


@lru_cache(maxsize=8)
def stored_matrix(checkpoint: TensorFiles, key: str) -> StoredMatrix | None:
    """The matrix, if it is encoded."""
    return next((found for reader in READERS if (found := reader.find(checkpoint, key))), None)


def stored_codec(
    checkpoint: TensorFiles, key: str, codec: Codec, dtype: torch.dtype, *, transposed: bool = False
) -> Codec:
    """How a matrix is stored: by the run's codec, but plain where a quantised checkpoint left it as it was.

    Raises:
        PrequantizedError: it is quantised in another way than the run asks for.
    """
    if found := stored_matrix(checkpoint, key):
        return found.codec(codec, transposed)
    return PlainCodec(dtype) if _is_quantised(checkpoint) else codec


@lru_cache(maxsize=8)
def _is_quantised(checkpoint: TensorFiles) -> bool:
    return any(reader.is_quantised(checkpoint) for reader in READERS)


def check_quantization_config(config: Any, codec: Codec, name: str) -> None:
    """Refuse quantised checkpoints that are not read, or that the run did not ask for.

    Raises:
        PrequantizedError: the key of the checkpoint's config is named.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    at = f"the checkpoint {name} (quantization_config in its config.json)"
    if not any(reader.check_config(settings, codec, at) for reader in READERS):
        raise PrequantizedError(
            f"{at} is quantised by {settings.get('quant_method')!r}: only bitsandbytes' 4-bit NF4 is read. Use the bf16 "
            "checkpoint with quantization.load_in_4bit true"
        )


__all__ = [
    "READERS",
    "PrequantizedError",
    "StoredMatrix",
    "check_quantization_config",
    "stored_codec",
    "stored_matrix",
]
