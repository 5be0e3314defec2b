"""PEFT's LoRA layers: the frozen base, the branches that are active now, and base and branch computed together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from sparselora_kernels import lora_linear

from ..codecs.linear import FrozenLinear, compute_dtype, compute_input
from ..sharding.parameters import is_dtensor

PLAIN_ONLY = "plain LoRA is supported in sparse layers"


@dataclass(frozen=True, slots=True)
class LoRABranch:
    """``x -> B(A(dropout(x))) * scaling`` of one adapter; ``A`` (r, in), ``B`` (out, r)."""

    a: nn.Linear
    b: nn.Linear
    dropout: nn.Module
    scaling: float

    @property
    def drops(self) -> bool:
        """Whether dropout changes the branch's input now."""
        return self.dropout.training and getattr(self.dropout, "p", 0.0) > 0


def set_base_linear(parent: nn.Module, name: str, linear: nn.Module) -> None:
    """Put ``linear`` where the base linear of ``parent.name`` was."""
    module = getattr(parent, name)
    if isinstance(module, LoraLayer):
        module.base_layer = linear
        merge_by_layout(module)
    else:
        setattr(parent, name, linear)


class _Merging:
    """Takes the place of a LoRA layer's ``merge`` or ``unmerge``: PEFT's own, on the weight as the family lays it out.

    An object, so that it is copied with its model.
    """

    def __init__(self, layer: LoraLayer, method: str) -> None:
        self.layer, self.method = layer, method

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        layer, frozen = self.layer, self.layer.base_layer
        if not isinstance(frozen, FrozenLinear):
            return getattr(type(layer), self.method)(layer, *args, **kwargs)
        if frozen.obstacle:
            raise ValueError(cannot_merge(frozen.obstacle))
        layer.base_layer = plain = frozen.plain()
        try:
            return getattr(type(layer), self.method)(layer, *args, **kwargs)
        finally:  # What was merged before an error is merged.
            layer.base_layer = frozen
            frozen.take(plain)


def cannot_merge(obstacle: str) -> str:
    return (
        f"{obstacle}: adapters cannot be merged into them, and the model cannot be unloaded or saved whole, in memory. "
        "Save the adapter, and merge the files: sparselora-dist merge --base ... --adapter ... --output ..."
    )


def merge_by_layout(module: nn.Module) -> None:
    """Make ``merge`` and ``unmerge`` of a LoRA layer right for what its base is stored as now."""
    if not isinstance(module, LoraLayer):
        return
    for method in ("merge", "unmerge"):
        if isinstance(module.base_layer, FrozenLinear):
            module.__dict__[method] = _Merging(module, method)
        elif isinstance(module.__dict__.get(method), _Merging):
            del module.__dict__[method]


def active_branches(module: nn.Module) -> Iterator[LoRABranch]:
    """The LoRA branches that PEFT would add to the base output now: none if disabled or merged.

    Raises:
        ValueError: an active adapter is a variant of LoRA (DoRA or another).
    """
    if not isinstance(module, LoraLayer) or module.disable_adapters or module.merged:
        return
    if _has_variant(module):
        raise ValueError(
            f"the active adapters {module.active_adapters} use a LoRA variant (DoRA or another): {PLAIN_ONLY}"
        )
    for name in module.active_adapters:
        if name in module.lora_A:
            yield LoRABranch(module.lora_A[name], module.lora_B[name], module.lora_dropout[name], module.scaling[name])


def cast_input(x: Tensor, branch: LoRABranch) -> Tensor:
    """``x`` in the dtype of the adapter's weights, as PEFT does."""
    return x.to(branch.a.weight.dtype)


def low_rank_update(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The active branches of ``module`` as one product: ``low`` (T, R), scaled, and ``b`` (out, R), in ``x.dtype``.

    ``x`` (T, in). Several adapters stand side by side, and PEFT's ``lora_bias`` is one more column.
    """
    branches = list(active_branches(module))
    return _side_by_side([first_product(branch, x) for branch in branches], branches, x.dtype)


def first_product(branch: LoRABranch, x: Tensor, channels: Tensor | None = None) -> Tensor:
    """``s · A · dropout(x)``: (T, in) -> (T, r); from the ``channels`` (k,) alone where ``x`` is (T, k)."""
    x = branch.dropout(cast_input(x, branch))
    if channels is None:
        return branch.a(x) * branch.scaling
    return nn.functional.linear(x, branch.a.weight.index_select(1, channels)) * branch.scaling


def kept_update(
    module: nn.Module, dense: Tensor, context: Tensor, channels: Tensor
) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    """The active branches of a module whose inputs are channels (down): ``low`` of dense tokens (D, in) and of context
    tokens (T, k), and ``b`` (out, R)."""
    branches = list(active_branches(module))
    low_dense, b = _side_by_side([first_product(branch, dense) for branch in branches], branches, dense.dtype)
    lows = [first_product(branch, context, channels) for branch in branches]
    low_context, _ = _side_by_side(lows, branches, context.dtype)
    if low_dense is None or low_context is None or b is None:
        return None, None, None
    return low_dense, low_context, b


def _side_by_side(
    lows: list[Tensor], branches: list[LoRABranch], dtype: torch.dtype
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    columns, bs = [], []
    for low, branch in zip(lows, branches):
        columns.append(low)
        bs.append(branch.b.weight)
        if branch.b.bias is not None:  # PEFT's lora_bias, which is trained.
            columns.append(low.new_full((low.shape[0], 1), branch.scaling))
            bs.append(branch.b.bias[:, None])
    if not bs:
        return None, None
    low, b = (columns[0], bs[0]) if len(bs) == 1 else (torch.cat(columns, 1), torch.cat(bs, 1))
    return low.to(dtype), b.to(dtype)


class FusedLoRA:
    """Takes the place of ``forward`` of one PEFT layer: base and branch in one operation where that is exact.

    That is a single active branch without dropout and without a bias of its own, in the dtype of the computation, on a
    frozen base that is ours or a plain linear. Everything else goes PEFT's way.

    Args:
        merge: see :func:`sparselora_kernels.lora_linear`.
    """

    def __init__(self, layer: LoraLayer, *, merge: bool) -> None:
        self.layer, self.merge = layer, merge

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.layer.base_layer
        compute = compute_input(x)
        branch = None if args or kwargs else self.branch(compute)
        if branch is None:
            return type(self.layer).forward(self.layer, x, *args, **kwargs)
        factors = branch.a.weight, branch.b.weight, branch.scaling
        if isinstance(base, FrozenLinear):
            # Not as a module: ZeRO-3 would hand the module copies of the factors that live until backward.
            return base.product(x, factors, merge=self.merge)
        y = lora_linear(compute.reshape(-1, x.shape[-1]), base.weight, base.bias, *factors, merge=self.merge)
        return y.view(*x.shape[:-1], y.shape[-1])

    def branch(self, x: Tensor) -> LoRABranch | None:
        """The one branch that can be computed with the base, for an input in the dtype of the computation."""
        branches = [] if _has_variant(self.layer) else list(active_branches(self.layer))
        return branches[0] if len(branches) == 1 and _together(self.layer.base_layer, branches[0], x) else None


def _together(base: nn.Module, branch: LoRABranch, compute: Tensor) -> bool:
    if branch.drops or branch.b.bias is not None or any(map(_replaced, (base, branch.a, branch.b))):
        return False
    if compute_dtype(branch.a.weight) != compute.dtype or is_dtensor(branch.a.weight):
        return False  # A DTensor is gathered by its own module's forward.
    if isinstance(base, FrozenLinear):
        return not is_dtensor(base.parts[0])
    return base.weight.dtype == compute.dtype and not is_dtensor(base.weight)


def _replaced(module: nn.Module) -> bool:
    """Somebody else needs the module's own forward (accelerate's offloading)."""
    return "forward" in module.__dict__ or hasattr(module, "_hf_hook")


def _hooked(module: nn.Module) -> bool:
    return _replaced(module) or bool(module._forward_hooks or module._forward_pre_hooks)


def _has_variant(module: LoraLayer) -> bool:
    return any(name in getattr(module, "lora_variant", {}) for name in module.active_adapters)


def fuse_lora(module: nn.Module, *, merge: bool) -> bool:
    """Give a LoRA layer on a frozen linear its :class:`FusedLoRA`; says whether it is one.

    Not where someone has put a hook on a part: fused, the parts' own forwards do not run.
    """
    if type(module) is not Linear or "forward" in module.__dict__:
        return False
    base = module.base_layer
    known = isinstance(base, FrozenLinear) or type(base) is nn.Linear
    parts = (base, *module.lora_A.values(), *module.lora_B.values())
    if not known or any(p.requires_grad for p in base.parameters()) or any(map(_hooked, parts)):
        return False
    module.__dict__["forward"] = FusedLoRA(module, merge=merge)
    return True


def unfuse_lora(module: nn.Module) -> None:
    """Undo :func:`fuse_lora`."""
    module.__dict__.pop("forward", None)
