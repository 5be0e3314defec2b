"""Checkpoints in Transformers' own fp8: blocks (DeepSeek's and Qwen's form), a scale per tensor, or FBGEMM's per channel.

X.weight e4m3 · X.weight_scale_inv, of weight_block_size or of the tensor; AutoFP8 and FBGEMM call it X.weight_scale
"""

from __future__ import annotations

import re
from typing import Any

from .family import Family, Scheme, refused
from .small_floats import Grain


def _scheme(settings: dict[str, Any], at: str) -> Scheme:
    for key, want in (("fmt", "e4m3"), ("expert_dtype", "fp8")):
        if settings.get(key, want) != want:
            raise refused(at, key, settings[key], f"only {want!r} is read")
    if settings["quant_method"] == "fbgemm_fp8":
        return Scheme("fp8", (Grain(1, 0),))
    block = settings.get("weight_block_size")
    if block is None:
        return Scheme("fp8", (Grain(0, 0), Grain(1, 0)))
    if not isinstance(block, (list, tuple)) or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
        raise refused(at, "weight_block_size", block, "two numbers from 1 are read, such as [128, 128], or null")
    return Scheme("fp8", (Grain(*block),), settings.get("scale_fmt") == "ue8m0")


_END = r"(?:(?<=\.)|(?=\.|$))"
"""Of a module's name: a router, ``mlp.gate``, is not ``mlp.gate_proj``."""


def _left(settings: dict[str, Any], module: str) -> bool:
    patterns = settings.get("modules_to_not_convert") or settings.get("ignored_layers") or []
    return any(re.match(f"(?:{pattern}){_END}", module) or module.endswith(pattern) for pattern in patterns)


READER = Family(methods=("fp8", "fbgemm_fp8"), scheme=_scheme, scales=("_scale_inv", "_scale"), left=_left)
