"""Checkpoints by NVIDIA's ModelOpt: fp8 and nvfp4, also its MX formats.

    FP8      X.weight e4m3 · X.weight_scale, per tensor, or per channel or block
    NVFP4    X.weight e2m1, two a byte · (X.weight_scale e4m3 · X.weight_scale_2)
    MX       X.weight · 2^(X.weight_scale - 127)

They say how they are stored in ``quantization_config``, older ones in ``hf_quant_config.json`` alone.
"""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

from .family import Family, Scheme, refused
from .matrix import REMEDY, PrequantizedError
from .small_floats import Grain

_ALGORITHMS = {
    "FP8": ("fp8", Grain(0, 0)),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8", Grain(1, 0)),
    "FP8_PB_WO": ("fp8", Grain(128, 128)),
    "MXFP8": ("fp8", Grain(1, 32)),
    "NVFP4": ("nvfp4", Grain(1, 16)),
    "W4A16_NVFP4": ("nvfp4", Grain(1, 16)),
    "MXFP4": ("mxfp4", Grain(1, 32)),
    "W4A8_MXFP4_FP8": ("mxfp4", Grain(1, 32)),
}


def _scheme(settings: dict[str, Any], at: str) -> Scheme | None:
    algorithm = settings.get("quant_algo")
    if algorithm is None and settings.get("kv_cache_quant_algo"):
        return None
    layers = (settings.get("quantized_layers") or {}) if algorithm == "MIXED_PRECISION" else {"": settings}
    found: dict[str, set[Grain]] = {}
    for layer, own in layers.items():
        named = own.get("quant_algo")
        key = f"quantized_layers.{layer}.quant_algo" if layer else "quant_algo"
        if named not in _ALGORITHMS:
            raise refused(at, key, named, f"read are {', '.join(_ALGORITHMS)}")
        form, grain = _ALGORITHMS[named]
        size = own.get("group_size")
        if grain.columns in (16, 32) and size not in (None, grain.columns):
            raise refused(at, "group_size", size, f"of {named} only {grain.columns} is read")
        found.setdefault(form, set()).add(grain)
    if len(found) != 1:
        raise PrequantizedError(
            f"{at} has quant_algo 'MIXED_PRECISION' with layers in {' and '.join(sorted(found)) or 'no format'}, but a "
            f"run has one quantization.format for all. {REMEDY}"
        )
    return next(Scheme(form, tuple(sorted(grains)), algorithm == "MXFP8") for form, grains in found.items())


def _left(settings: dict[str, Any], module: str) -> bool:
    patterns = settings.get("ignore") or settings.get("exclude_modules") or []
    if any(fnmatch(module, pattern) or module.startswith(f"{pattern}.") for pattern in patterns):
        return True
    layers = settings.get("quantized_layers") or {}
    return bool(layers) and module not in layers


READER = Family(
    methods=("modelopt", "modelopt_fp8", "modelopt_fp4"),
    scheme=_scheme,
    scales=("_scale",),
    whole="_scale_2",
    left=_left,
    unread=("pre_quant_scale", "svdquant_lora_a", "weight_zero_point"),
)
