"""SparseLoRA: compute-efficient LoRA fine-tuning under DeepSpeed ZeRO-3 and PyTorch FSDP2.

config = SparseLoRAConfig.from_dict({"layers": {"ffn": {"3-30": 0.99}}, "start_step": 0.05})
apply_sparselora(peft_model, config)
Trainer(model=peft_model, callbacks=[SparseLoRACallback()], ...)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .apply import apply_sparselora, remove_sparselora, selection, set_step, shared_masks, sparse_tokens
    from .config.sparse import SparseLoRAConfig
    from .config.sparse_base import SparseBaseConfig
    from .integrations.own_loss import SparseLossMixin
    from .integrations.trainer import SparseLoRACallback

_HOMES = {
    "SparseBaseConfig": "config.sparse_base",
    "SparseLoRACallback": "integrations.trainer",
    "SparseLoRAConfig": "config.sparse",
    "SparseLossMixin": "integrations.own_loss",
    "apply_sparselora": "apply",
    "remove_sparselora": "apply",
    "selection": "apply",
    "set_step": "apply",
    "shared_masks": "apply",
    "sparse_tokens": "apply",
}

__all__ = [
    "SparseBaseConfig",
    "SparseLoRACallback",
    "SparseLoRAConfig",
    "SparseLossMixin",
    "apply_sparselora",
    "remove_sparselora",
    "selection",
    "set_step",
    "shared_masks",
    "sparse_tokens",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing the package starts neither torch nor transformers.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
