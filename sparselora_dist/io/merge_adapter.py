"""The adapter of a merge: PEFT's LoRA, checked tensor by tensor against the base model's shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .adapter import ADAPTER_FILE
from .adapter_config import CONFIG_FILE, PREFIX, read_adapter_config, stored_shape
from .loftq import CODE_BITS, ROUNDS, Mark, Shift
from .loftq import KEY as LOFTQ
from .manifest import CorruptFileError
from .marker import KEY, marked_modules
from .shard_files import TensorFiles, read_json


@dataclass(frozen=True, slots=True)
class Delta:
    """What is added to one base tensor: ``scaling * (B @ A)``, or ``scaling * bias``."""

    scaling: float
    keys: tuple[str, ...]
    """In the adapter file: A and B, or the bias alone."""


class Adapter:
    """A PEFT folder with a LoRA adapter.

    Attributes:
        config: PEFT's ``LoraConfig``.
        deltas: by the name of the base tensor.
        replaced: key in the adapter file by the name of the base tensor (``modules_to_save``, trained biases).
        masked: names of the base tensors whose zeros it was trained under.
        stored: how its base was stored, and
        shift: what of it was subtracted before, where LoftQ started it.

    Raises:
        FileNotFoundError, CorruptFileError: a missing, truncated or inconsistent file.
        ValueError: not plain LoRA; the key of ``adapter_config.json`` is named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / ADAPTER_FILE
        self.config = read_adapter_config(folder / CONFIG_FILE, "merged", (KEY, LOFTQ, ROUNDS, CODE_BITS))
        said = read_json(folder / CONFIG_FILE)
        marked = marked_modules(said, folder / CONFIG_FILE)
        self.stored = Mark.read(said, folder / CONFIG_FILE)
        self.shift = Shift.read(folder, self.stored) if self.stored else Shift()
        self.masked = {f"{module}.weight" for module in marked}
        self.files = TensorFiles(folder, [ADAPTER_FILE])
        self.deltas: dict[str, Delta] = {}
        self.replaced: dict[str, str] = {}

    def resolve(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Find the base tensor of every adapter tensor, and check that no tensor is left over or missing.

        Args:
            shapes: of the base model's tensors, by name.
        """
        factors: dict[str, dict[str, str]] = {}
        for key in self.files.tensors:
            name = self._own_name(key)
            module, lora, part = name.partition(".lora_")
            if lora:
                factors.setdefault(module, {})[part] = key
            else:
                self._replace(name.replace(".base_layer.", "."), key, shapes)
        for module, parts in factors.items():
            self._resolve_factors(module, parts, shapes)
        if not factors and not self.replaced:
            raise CorruptFileError(f"{self.path} is empty")
        self._check_targets(set(factors), shapes)
        for name in sorted(self.masked):
            for where, lacks in (("the base model", name not in shapes), (self.path, name not in self.deltas)):
                if lacks:
                    raise CorruptFileError(
                        f"{self.folder / CONFIG_FILE}: {KEY!r} names {name.removesuffix('.weight')!r}, which {where} does "
                        "not have"
                    )

    def touches(self, name: str) -> bool:
        return name in self.deltas or name in self.replaced

    def add(self, name: str, value: Tensor) -> Tensor:
        """``value`` (a base tensor, any dtype) plus its delta in fp32; as it is where there is none."""
        delta = self.deltas.get(name)
        if delta is None:
            return value
        tensors = [self.files.get(key).to(value.device, torch.float32) for key in delta.keys]
        result = value.to(torch.float32, copy=True)
        if len(tensors) == 1:
            return result.add_(tensors[0], alpha=delta.scaling)
        return result.addmm_(tensors[1], tensors[0], alpha=delta.scaling)

    # --- resolution --------------------------------------------------------------------------------------------------

    def _own_name(self, key: str) -> str:
        if not key.startswith(PREFIX):
            raise CorruptFileError(f"{self.path}: {key!r} does not start with {PREFIX!r}, as PEFT writes it")
        return key.removeprefix(PREFIX)

    def _shape(self, key: str) -> tuple[int, ...]:
        return stored_shape(self.files, key)

    def _replace(self, name: str, key: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if name not in shapes:
            raise CorruptFileError(f"{self.path}: {key!r} belongs to nothing in the base model (no tensor {name!r})")
        if self._shape(key) != shapes[name]:
            raise CorruptFileError(
                f"{self.path}: {key!r} has shape {self._shape(key)}, the base model's {name!r} {shapes[name]}; "
                "a base with another vocabulary must be resized first"
            )
        self.replaced[name] = key

    def _resolve_factors(self, module: str, parts: dict[str, str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        if unknown := sorted(set(parts) - {"A.weight", "B.weight", "B.bias"}):
            raise ValueError(
                f"{self.path}: {parts[unknown[0]]!r} is not plain LoRA of a linear layer (lora_A.weight, lora_B.weight, "
                "lora_B.bias)"
            )
        for letter in "AB":
            if f"{letter}.weight" not in parts:
                raise CorruptFileError(f"{self.path}: {PREFIX}{module}.lora_{letter}.weight is missing")
        if f"{module}.weight" not in shapes:
            raise CorruptFileError(
                f"{self.path}: {parts['A.weight']!r} belongs to nothing in the base model (no tensor '{module}.weight')"
            )
        rank, scaling = self._rank_and_scaling(module)
        shape = shapes[f"{module}.weight"]
        expected = {"A.weight": (rank, *shape[1:]), "B.weight": (*shape[:1], rank), "B.bias": shape[:1]}
        for part, key in parts.items():
            if self._shape(key) != expected[part]:
                raise CorruptFileError(
                    f"{self.path}: {key!r} has shape {self._shape(key)}, expected {expected[part]} for rank {rank} and "
                    f"the base model's '{module}.weight' {shape}"
                )
        self.deltas[f"{module}.weight"] = Delta(scaling, (parts["A.weight"], parts["B.weight"]))
        if "B.bias" in parts:
            if f"{module}.bias" not in shapes:
                raise ValueError(
                    f"{self.path}: {parts['B.bias']!r} (lora_bias) cannot be merged: the base layer has no bias"
                )
            self.deltas[f"{module}.bias"] = Delta(scaling, (parts["B.bias"],))

    def _rank_and_scaling(self, module: str) -> tuple[int, float]:
        """As PEFT resolves them: a pattern is a regular expression for the end of the module's name."""
        from peft.utils.other import get_pattern_key

        ranks, alphas = self.config.rank_pattern, self.config.alpha_pattern
        rank = ranks.get(get_pattern_key(ranks, module), self.config.r)
        alpha = alphas.get(get_pattern_key(alphas, module), self.config.lora_alpha)
        return rank, alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    def _check_targets(self, found: set[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        from peft.tuners.tuners_utils import check_target_module_exists

        for name in self.config.modules_to_save or []:
            if not any(f".{name}." in f".{saved}" for saved in self.replaced):
                raise CorruptFileError(f"{self.path} lacks 'modules_to_save' {name!r} of {CONFIG_FILE}")
        if self.config.target_modules in (None, "all-linear"):
            return
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            if len(shape) != 2 or module == name:
                continue
            targeted = bool(check_target_module_exists(self.config, module))
            if targeted and module not in found:
                raise CorruptFileError(
                    f"{self.path} is not whole: {module!r} is one of 'target_modules' of {CONFIG_FILE}, but has no tensors"
                )
            if module in found and not targeted:
                raise CorruptFileError(
                    f"{self.path} has tensors for {module!r}, which 'target_modules' of {CONFIG_FILE} do not name"
                )
