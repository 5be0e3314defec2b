"""A family of checkpoints in small floats: what its ``quantization_config`` says, and what it calls its tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from sparselora_kernels.floats import E8M0

from ...codecs import Codec, FloatsCodec
from ..shard_files import TensorFiles, read_json
from .matrix import REMEDY, PrequantizedError
from .small_floats import Grain, SmallFloats

log = logging.getLogger(__name__)

MODELOPT_FILE = "hf_quant_config.json"


Planned = Callable[[str, bool], "Codec | None"]
"""From a matrix' module, and whether it is stored transposed, to how it is stored; ``None``: it stays as it is."""


class Scheme(NamedTuple):
    """How the quantised matrices of a checkpoint are stored."""

    format: str
    """What ``quantization.format`` calls it."""
    grains: tuple[Grain, ...]
    """How far a scale may reach."""
    powers: bool = False
    """Whether fp8 has scales of one byte, powers of two; the tensors themselves say it."""


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """Checkpoints by one library; one of ``READERS``."""

    methods: tuple[str, ...]
    """What it calls itself in ``quant_method``."""
    scheme: Callable[[dict[str, Any], str], Scheme | None]
    """Of a ``quantization_config`` and where it stands, for errors; ``None``: it quantises no weights. Raises
    PrequantizedError for what is not read, by key and value."""
    scales: tuple[str, ...]
    """Behind the name of a weight: its scales, in the order they are looked for."""
    packed: str = ""
    """Behind the name of a weight of two 4-bit codes a byte."""
    whole: str = ""
    """Behind the name of a weight: nvfp4's scale over all."""
    over: bool = False
    """It divides."""
    left: Callable[[dict[str, Any], str], bool] = lambda settings, module: False
    """Whether a ``quantization_config`` leaves a module as it is."""
    unread: tuple[str, ...] = ()
    """Tensors beside a weight that change what it means, and are not read."""

    def find(self, checkpoint: TensorFiles, key: str) -> SmallFloats | None:
        """The matrix, if this family quantised it."""
        if (scheme := _scheme(self, checkpoint)) is None or (codes := self._codes(checkpoint, key)) is None:
            return None
        module = key.removesuffix("weight")
        if found := next((module + name for name in self.unread if module + name in checkpoint.tensors), None):
            raise PrequantizedError(f"{found} of {checkpoint.folder} changes what {key!r} is: not read. {REMEDY}")
        scales = next((key + name for name in self.scales if key + name in checkpoint.tensors), key + self.scales[0])
        whole = key + self.whole if scheme.format == "nvfp4" else None
        return SmallFloats(checkpoint, key, codes, scales, scheme.grains, whole, self.over)

    def is_quantised(self, checkpoint: TensorFiles) -> bool:
        """Whether this family quantised any of its matrices."""
        return _scheme(self, checkpoint) is not None

    def check_config(self, settings: dict[str, Any], codec: Codec, at: str) -> bool:
        """Whether a ``quantization_config`` is of this family.

        Raises:
            PrequantizedError: it is, in a form that is not read, or not what the run's ``codec`` is.
        """
        if settings.get("quant_method") not in self.methods:
            return False
        if (scheme := self.scheme(settings, at)) is None:
            return True
        if codec.name != scheme.format:
            raise PrequantizedError(f'{at} is {scheme.format}: set quantization.format "{scheme.format}"')
        log.debug("%s: scales of activations and of the key-value cache are not used", at)
        return True

    def planned(self, settings: dict[str, Any], codec: Codec, at: str) -> Planned | None:
        """How its config alone says that matrices are stored, ``None`` where none is quantised; see :meth:`check_config`."""
        self.check_config(settings, codec, at)
        if (scheme := self.scheme(settings, at)) is None or not isinstance(codec, FloatsCodec):
            return None
        own, grain = replace(codec, scale=E8M0 if scheme.powers else codec.scale), scheme.grains[0]

        def stored(module: str, transposed: bool) -> Codec | None:
            every, block = grain[:: -1 if transposed else 1]
            return None if self.left(settings, module) else replace(own, block=block, every=every)

        return stored

    def _codes(self, checkpoint: TensorFiles, key: str) -> str | None:
        if self.packed and key + self.packed in checkpoint.tensors:
            return key + self.packed
        held = checkpoint.tensors.get(key)
        coded = held is not None and (held.dtype.startswith("F8") or (held.dtype == "U8" and not self.packed))
        return key if coded else None


@lru_cache(maxsize=8)
def _scheme(family: Family, checkpoint: TensorFiles) -> Scheme | None:
    settings = quantization_settings(checkpoint.folder)
    if settings is None or settings.get("quant_method") not in family.methods:
        return None
    return family.scheme(settings, f"the checkpoint {checkpoint.folder}")


def quantization_settings(folder: Path) -> dict[str, Any] | None:
    """The ``quantization_config`` of a model folder; that of ModelOpt may be in a file of its own."""
    config, own = folder / "config.json", folder / MODELOPT_FILE
    settings = read_json(config).get("quantization_config") if config.is_file() else None
    if settings is None and own.is_file():
        settings = {"quant_method": "modelopt", **(read_json(own).get("quantization") or {})}
    return settings


def refused(at: str, key: str, value: Any, read: str) -> PrequantizedError:
    """The error for a setting that is not read; ``read`` says which are."""
    return PrequantizedError(f"{at} has {key} {value!r}: {read}. {REMEDY}")
