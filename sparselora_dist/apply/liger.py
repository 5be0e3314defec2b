"""Liger's RMS norm and RoPE in place of the family's own (``train.use_liger_kernel``).

Liger replaces names in Transformers' module of the family, for the whole process, so this comes before the model is
built. Its SwiGLU and its losses stay off: the sparse FFN and the packed LM head take their places.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from ..config.errors import ConfigError

KEY = "train.use_liger_kernel"


def liger_patch(family: str) -> Callable[..., None]:
    """Liger's own patch function of a family (``model_type``).

    Raises:
        ConfigError: there is no GPU, liger-kernel is not installed, or it has no patch for the family.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            f"'{KEY}' is true, but there is no GPU, and Liger's kernels run on nothing else: set it to false"
        )
    if find_spec("liger_kernel") is None:
        raise ConfigError(
            f"'{KEY}' is true, but liger-kernel is not installed: pip install 'sparselora-dist[liger]', or set it to false"
        )
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as patches

    if family not in patches:
        raise ConfigError(
            f"'{KEY}' is true, but the installed liger-kernel has no patch for '{family}': set it to false"
        )
    return patches[family]


def use_liger(family: str, *, cross_entropy: bool = False) -> None:
    """Patch the family's norm and RoPE; ``cross_entropy`` adds Liger's loss function (benchmarks compare with it).

    Raises:
        ConfigError: see :func:`liger_patch`.
    """
    liger_patch(family)(
        rope=True, rms_norm=True, swiglu=False, cross_entropy=cross_entropy, fused_linear_cross_entropy=False
    )
