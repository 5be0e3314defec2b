"""The adapter in PEFT's format, verified after every save."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

from .loftq import SHIFT, Shift
from .manifest import CorruptFileError, read_safetensors, share

ADAPTER_FILE = "adapter_model.safetensors"


def is_adapted(config: LoraConfig, module: str) -> bool:
    """Whether PEFT will copy or wrap the module of that name."""
    copies = config.modules_to_save or []
    return any(module == name or module.endswith(f".{name}") for name in copies) or bool(
        check_target_module_exists(config, module)
    )


def save_adapter(model: Any, parameters: dict[str, Tensor], folder: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, then read them back and compare.

    Beside them goes what LoftQ's base was stored less, where there is something.

    Args:
        model: the PEFT model; its own (sharded) values are not read.
        parameters: whole values of the trainable parameters by name.
        folder: made if it does not exist.

    Raises:
        CorruptFileError: what is on disk is not what was to be saved (empty, missing or different tensors).
    """
    model.save_pretrained(str(folder), state_dict=parameters, save_embedding_layers=False)
    # PEFT adds a model card that describes nothing yet.
    (folder / "README.md").unlink(missing_ok=True)
    expected = get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False)
    share(folder / ADAPTER_FILE)
    getattr(model, SHIFT, Shift()).save(folder)
    saved, _ = read_safetensors(folder / ADAPTER_FILE)
    for name in {*expected, *saved}:
        if name not in saved or name not in expected or not torch.equal(saved[name], expected[name]):
            raise CorruptFileError(f"{folder / ADAPTER_FILE} was not saved whole: {name} is missing or differs")
    if not saved or any(tensor.numel() == 0 for tensor in saved.values()):
        raise CorruptFileError(f"{folder / ADAPTER_FILE} is empty: no adapter weights were given")


def saved_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The name that PEFT gives each of the model's trainable parameters on disk, mapped back: saved name -> own name."""
    own = list(names)
    numbered = {name: torch.tensor([number]) for number, name in enumerate(own)}
    saved = get_peft_model_state_dict(model, state_dict=numbered, save_embedding_layers=False)
    return {name: own[int(number)] for name, number in saved.items()}


def load_adapter(model: Any, folder: Path) -> None:
    """Put an adapter's values into a PEFT model whose parameters are whole (before an engine shards them)."""
    put_adapter(model, read_safetensors(folder / ADAPTER_FILE)[0], folder / ADAPTER_FILE)


def put_adapter(model: Any, tensors: dict[str, Tensor], path: Path) -> None:
    """The same with values by PEFT's names on disk; ``path`` is where they are from."""
    result = set_peft_model_state_dict(model, tensors)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    if wrong := [*result.unexpected_keys, *sorted(trainable.intersection(result.missing_keys))]:
        raise CorruptFileError(f"{path} does not fit the model: {wrong[:3]}")
