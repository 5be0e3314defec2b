"""A kernel with everything that decides its machine code: what a launcher chooses from, and what is compiled ahead."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

TYPE_NAMES: dict[torch.dtype, str] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
"""Triton's names of the element types; a pointer is ``"*"`` and the name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One configuration of one kernel.

    Every ``gpu/<op>.py`` has a function ``variants() -> Iterator[Variant]`` that draws on the tables that its
    launchers draw on, so that nothing is launched that was not compiled ahead.
    """

    kernel: Any
    """The function under ``@triton.jit``."""
    label: str
    """Unique in its file: ``"<kernel> <what differs>"``."""
    signature: dict[str, str] = field(default_factory=dict)
    """Type of each parameter that is not constexpr: ``"*bf16"``, ``"*i64"``, ``"fp32"``, ``"i32"``."""
    constants: dict[str, object] = field(default_factory=dict)
    """Value of each constexpr parameter; ``None`` for a pointer that is not passed."""
    num_warps: int = 4
    num_stages: int = 2
    matrix_units: bool = False
    """Its products must run on the matrix units (mma.sync, wgmma, tcgen05)."""
    fp_fusion: bool = True
    """Whether a product and a sum may be rounded once (``enable_fp_fusion``)."""
    aligned: tuple[str, ...] = ()
    """Parameters that are divisible by 16 (bytes, for a pointer)."""
