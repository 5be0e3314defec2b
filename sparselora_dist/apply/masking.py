"""Which LoRA layers of a model are on a pruned matrix, and that their adapter can keep its zeros."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sparselora_kernels import nonzero

from ..codecs.linear import FrozenLinear
from ..config.sparse import SparseLoRAConfig
from ..config.sparse_base import SparseBaseConfig
from ..io.adapter_config import PREFIX
from ..layers.lora import active_branches
from ..layers.masked import mask_lora, obstacle
from ..sharding.parameters import full_tensor
from ..sharding.placement import waiting_rows
from ..sync.everyone import everyone
from .tuners import check_lora

_ROWS = 1024  # Looked at together.


def find_pruned(model: nn.Module, config: SparseLoRAConfig, sparse_base: SparseBaseConfig) -> dict[str, LoraLayer]:
    """The LoRA layers whose base matrix is pruned, by the base model's names. A collective of all ranks.

    Raises:
        ValueError: there is none; or one carries an adapter that cannot be masked. The matrix is named.
    """
    if config.enabled and config.lora_branch != "kept":
        raise ValueError(
            f"SparseLoRAConfig.lora_branch is {config.lora_branch!r} with a sparse base: the branch is masked with the "
            'matrix that it is added to, and so limited to its kept channels: "kept"'
        )
    named = model.named_modules()
    adapted = {name.removeprefix(PREFIX): module for name, module in named if isinstance(module, BaseTunerLayer)}
    if not adapted:
        raise ValueError("sparse_base masks adapters, and the model has none: give it one by PEFT first")
    counts = {name: _zeros(module) for name, module in adapted.items()}
    shares = _shares(counts)
    pruned = {name: adapted[name] for name, share in shares.items() if share >= sparse_base.min_sparsity}
    if not pruned:
        most = max(shares, key=lambda name: shares[name], default=None)
        seen = f"the most has {most}: {shares[most]:.1%}" if most else "no adapter is on a linear layer"
        raise ValueError(
            f"sparse_base is enabled, but no adapter is on a pruned matrix (zeros from {sparse_base.min_sparsity:.0%}; "
            f"{seen}): prune the base first (sparselora-dist prune), or switch sparse_base off"
        )
    for name, module in pruned.items():
        _check(name, module)
    return pruned


def mask(pruned: dict[str, LoraLayer], sparse_base: SparseBaseConfig) -> None:
    """Give each its mask."""
    for name, layer in pruned.items():
        mask_lora(layer, name, sparse_base.gradient)


def _check(name: str, module: nn.Module) -> None:
    check_lora(name, module)
    assert isinstance(module, LoraLayer)
    base: Any = module.base_layer
    if type(module) is not Linear or not (isinstance(base, FrozenLinear) or type(base) is nn.Linear):
        raise ValueError(
            f"{name} is pruned, but a {type(base).__name__}: sparse_base masks adapters of torch.nn.Linear and of matrices "
            "that a run has stored (quantization)"
        )
    if any(p.requires_grad for p in base.parameters()):
        raise ValueError(f"{name} is trainable: a pruned matrix keeps its zeros only frozen")
    branches = list(active_branches(module))
    if branches and (reason := obstacle(branches)):
        raise ValueError(f"{name} is pruned, and sparse_base is enabled, but {reason}")


def _zeros(module: BaseTunerLayer) -> tuple[int, int]:
    """Of the matrix under an adapter, zeros and values that this rank has; (0, 0) where it is no matrix."""
    base = module.get_base_layer()
    if isinstance(base, FrozenLinear):
        first: Any = base.parts[0]
    else:
        first = getattr(base, "weight", None)
        if not isinstance(first, Tensor) or (first.ndim != 2 and not hasattr(first, "ds_shape")):
            return 0, 0
    rows = waiting_rows(first)
    if rows is None:
        if first.device.type == "meta":
            raise ValueError(
                "sparse_base reads zeros from the frozen weights, and they are on the meta device: load them"
            )
        rows = full_tensor(first)
    zeros = total = 0
    for part in rows.split(_ROWS):
        kept = nonzero(base.codec.stored((part,), base.row_length) if isinstance(base, FrozenLinear) else part)
        zeros, total = zeros + int((~kept).sum()), total + kept.numel()
    return zeros, total


def _shares(counts: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Of all ranks together: each has the whole matrix, or its rows."""
    told = everyone(counts) if dist.is_initialized() and dist.get_world_size() > 1 else [counts]
    shares = {}
    for name in counts:
        zeros, values = (sum(one[name][i] for one in told) for i in (0, 1))
        if values:
            shares[name] = zeros / values
    return shares
