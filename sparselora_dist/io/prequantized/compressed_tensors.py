"""Checkpoints by compressed-tensors (llm-compressor, vLLM): fp8 of any grain, nvfp4, mxfp4.

fp8      X.weight e4m3 · X.weight_scale, per tensor, channel, group or block; a byte of weight_scale is a power of two
nvfp4    X.weight_packed e2m1 · (X.weight_scale e4m3 / X.weight_global_scale)
mxfp4    X.weight_packed e2m1 · 2^(X.weight_scale - 127)
"""

from __future__ import annotations

import re
from typing import Any

from ..shard_files import PACKED
from .family import Family, Scheme, refused
from .matrix import REMEDY, PrequantizedError
from .small_floats import Grain

_FORMATS = {
    "float-quantized": "fp8",
    "naive-quantized": "fp8",
    "mxfp8-quantized": "fp8",
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
}
_READ = f"read are {', '.join(_FORMATS)}"
_GROUPS = {"nvfp4": 16, "mxfp4": 32}


def _scheme(settings: dict[str, Any], at: str) -> Scheme | None:
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise refused(at, "sparsity_config.format", sparsity, "only 'dense' is read")
    groups = settings.get("config_groups") or {}
    found: dict[str, list[Grain]] = {}
    for name, group in groups.items():
        where = f"config_groups.{name}"
        if not isinstance(group, dict):
            raise refused(at, where, group, "a group is read as it is saved, with its 'weights'")
        if weights := group.get("weights"):
            form = _format(settings, group, at, where)
            found.setdefault(form, []).append(_grain(form, weights, at, f"{where}.weights"))
    if len(found) > 1:
        raise PrequantizedError(
            f"{at} has config_groups in {' and '.join(sorted(found))}, but a run has one quantization.format for all. "
            f"{REMEDY}"
        )
    powers = settings.get("format") == "mxfp8-quantized"
    return next((Scheme(form, tuple(grains), powers) for form, grains in found.items()), None)


def _format(settings: dict[str, Any], group: dict[str, Any], at: str, where: str) -> str:
    own = group.get("format")
    value = own or settings.get("format")
    if value not in _FORMATS:
        raise refused(at, f"{where}.format" if own else "format", value, _READ)
    return _FORMATS[value]


def _grain(form: str, weights: dict[str, Any], at: str, where: str) -> Grain:
    bits = 8 if form == "fp8" else 4
    for key, want in (
        ("num_bits", bits),
        ("type", "float"),
        ("symmetric", True),
        ("dynamic", False),
        ("actorder", None),
    ):
        if weights.get(key, want) != want:
            raise refused(at, f"{where}.{key}", weights[key], f"of {form} only {want!r} is read")
    size = weights.get("group_size")
    if form in _GROUPS:
        if size != _GROUPS[form]:
            raise refused(at, f"{where}.group_size", size, f"of {form} only {_GROUPS[form]} is read")
        return Grain(1, size)
    strategy = weights.get("strategy") or ("channel" if size == -1 else "group" if size else "tensor")
    if strategy == "group" and isinstance(size, int) and size > 0:
        return Grain(1, size)
    structure = weights.get("block_structure")
    if strategy == "block" and isinstance(structure, list) and len(structure) == 2:
        return Grain(*structure)
    grains = {"tensor": Grain(0, 0), "channel": Grain(1, 0)}
    if strategy not in grains:
        raise refused(
            at, f"{where}.strategy", strategy, "read are 'tensor', 'channel', 'group' and 'block', with its size"
        )
    return grains[strategy]


def _left(settings: dict[str, Any], module: str) -> bool:
    def named(patterns: list[str]) -> bool:
        return any(re.match(p[3:], module) if p.startswith("re:") else p in (module, "Linear") for p in patterns)

    groups = [group for group in settings["config_groups"].values() if group.get("weights")]
    return named(settings.get("ignore") or []) or not any(named(group.get("targets") or []) for group in groups)


READER = Family(
    methods=("compressed-tensors",),
    scheme=_scheme,
    scales=("_scale",),
    packed=PACKED,
    whole="_global_scale",
    over=True,
    left=_left,
    unread=("weight_zero_point", "weight_g_idx", "weight_bitmask"),
)
