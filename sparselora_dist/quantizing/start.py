"""The adapter that LoftQ's alternation leaves beside the codes: ``loftq_init`` in the folder of a quantised model.

A run over that folder starts there when its ``lora.init_lora_weights`` is "loftq" (:mod:`sparselora_dist.io.start_adapter`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import ConfigError, LoraSection
from ..config.errors import show
from ..config.files import load_file
from ..io.adapter import ADAPTER_FILE
from ..io.adapter_config import CONFIG_FILE, PREFIX
from ..io.loftq import CODE_BITS, ROUNDS, START
from ..io.manifest import CorruptFileError, read_safetensors
from ..io.model_folder import publish_tensors, write_json
from ..io.shard_files import read_json
from ..method.loftq import Pair


def lora_of(path: str | os.PathLike[str]) -> LoraSection:
    """The ``lora`` section of a run's file.

    Raises:
        ConfigError: the file cannot be read, or its adapter does not start by LoftQ.
    """
    data: Any = load_file(path)
    section = data.get("lora") if isinstance(data, dict) else None
    lora = LoraSection.from_dict({} if section is None else section)
    if not lora.loftq_rounds:
        raise ConfigError(
            f"'lora.init_lora_weights' of {path} is {show(lora.values.get('init_lora_weights', True))}: --loftq takes the "
            'file of a run whose adapter starts by LoftQ; set it to "loftq"'
        )
    for key in ("modules_to_save", "lora_bias"):
        if lora.values.get(key):
            raise ConfigError(
                f"'lora.{key}' of {path} is {show(lora.values[key])}: a start beside the codes is of matrices alone. Train "
                "without, or over a format that is made on load"
            )
    return lora


class GrowingAdapter:
    """A decoder layer a file, until :meth:`finish` makes them one.

    Args:
        model: the folder that it grows in.
    """

    def __init__(self, model: Path) -> None:
        self.folder = model / START

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    @staticmethod
    def _names(module: str) -> tuple[str, str]:
        return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"

    def add(self, layer: int, pairs: dict[str, Pair]) -> None:
        """Write a layer's pairs, by the module in the causal LM."""
        self.folder.mkdir(exist_ok=True)
        named = {name: side for module, pair in pairs.items() for name, side in zip(self._names(module), pair)}
        publish_tensors({name: side.cpu().contiguous() for name, side in named.items()}, self._file(layer))

    def layer(self, layer: int, modules: list[str]) -> dict[str, Pair]:
        """What was written of a layer's adapted modules.

        Raises:
            CorruptFileError: something of them is missing.
        """
        if not modules:
            return {}
        tensors = read_safetensors(self._file(layer))[0]
        names = {module: self._names(module) for module in modules}
        if missing := [name for both in names.values() for name in both if name not in tensors]:
            raise CorruptFileError(
                f"{self._file(layer)} lacks {missing[0]}: remove {self.folder.parent} and begin anew"
            )
        return {module: (tensors[a], tensors[b]) for module, (a, b) in names.items()}

    def finish(self, lora: LoraSection, bits: int, base: Path) -> None:
        """Write the adapter that PEFT reads, of the model in codes of ``bits`` bits that will be at ``base``."""
        files = sorted(self.folder.glob("layer-*.safetensors"))
        if not (self.folder / ADAPTER_FILE).exists():  # It is whole if it is there, and files may be gone then.
            tensors: dict[str, Tensor] = {}
            for file in files:
                tensors |= read_safetensors(file)[0]
            publish_tensors(tensors, self.folder / ADAPTER_FILE)
        config = lora.build()
        config.base_model_name_or_path, config.inference_mode = str(base), True
        config.save_pretrained(str(self.folder))
        made = {ROUNDS: lora.loftq_rounds, CODE_BITS: bits}
        write_json(read_json(self.folder / CONFIG_FILE) | made, self.folder / CONFIG_FILE)
        for file in files:
            file.unlink()
