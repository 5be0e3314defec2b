"""Where a model's parameters are in its files, which may use older names, or hold the experts of a layer one by one.

Transformers' own table of conversions says so; a conversion that is more than another name, or experts side by side, is
refused by name.
"""

from __future__ import annotations

import re
from typing import Any

from .manifest import CorruptFileError
from .shard_files import FLOATS, PACKED, Stack, TensorFiles


def find_names(model: Any, files: TensorFiles) -> None:
    """Say in ``files`` what it calls a model's parameters: other names (``renamed``), and stacks of experts (``stacks``).

    Args:
        model: may be on the meta device.
        files: of its checkpoint.

    Raises:
        CorruptFileError: an expert is missing, or its matrices do not fit together.
        ValueError: a conversion that is not known here.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    state = model.state_dict()
    transforms = get_model_conversion_mapping(model) or []
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parts: dict[str, dict[str, list[str]]] = {}
    for key in (name.removesuffix(PACKED) for name in files.tensors):
        if key in state:
            continue
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if pattern is not None:
            parts.setdefault(name, {}).setdefault(pattern, []).append(key)
        elif name in state and name != key:
            files.renamed[name] = key
    whole = {key for key, info in files.tensors.items() if info.dtype in (*FLOATS, "F8_E4M3")}
    for name, found in parts.items():
        if name not in state:
            continue
        if coded := [key for keys in found.values() for key in keys if key not in whole]:
            raise ValueError(
                f"{files.folder} holds {name!r} quantised, as {coded[0]!r}: routed experts are read in bf16, fp16, "
                "fp32 or fp8. Use the checkpoint that it was made from"
            )
        converter = converter_of[next(iter(found))]
        operations = [(type(one).__name__, getattr(one, "dim", None)) for one in converter.operations]
        if operations not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
            raise ValueError(
                f"{files.folder} holds {name!r} as {next(iter(found.values()))[0]!r}, which Transformers converts by "
                f"{', '.join(kind for kind, _ in operations)}: not supported in a run. Load the model with Transformers, "
                "save it with save_pretrained(..., save_original_format=False), and name that folder"
            )
        order = [found.get(pattern, []) for pattern in converter.source_patterns]
        files.stacks[name] = _stack(
            name, [sorted(keys, key=_numbers) for keys in order], tuple(state[name].shape), files
        )


def _numbers(key: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", key)]


def _stack(name: str, order: list[list[str]], shape: tuple[int, ...], files: TensorFiles) -> Stack:
    if any(len(keys) != shape[0] for keys in order):
        counts = " and ".join(str(len(keys)) for keys in order)
        raise CorruptFileError(
            f"{files.folder} has matrices of {counts} experts for {name!r}, but config.json asks for {shape[0]}"
        )
    for keys in zip(*order):
        shapes = [files.tensors[key].shape for key in keys]
        rows = sum(own[0] for own in shapes)
        if (
            any(len(own) != 2 for own in shapes)
            or (rows, *shapes[0][1:]) != shape[1:]
            or len({s[1] for s in shapes}) > 1
        ):
            raise CorruptFileError(
                f"{keys[0]} of {files.folder} has shape {shapes[0]}, but config.json asks for {shape[1:]} in all: the "
                "files belong to different models"
            )
    return Stack(tuple(zip(*order)), shape)
