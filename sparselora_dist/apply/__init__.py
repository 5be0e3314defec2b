"""How a model is built, made sparse in place, and undone."""

from .factors import estimator_factors
from .model import apply_sparselora, remove_sparselora, selection, set_step
from .state import SparseState, find_state
from .tokens import shared_masks, sparse_tokens

__all__ = [
    "SparseState",
    "apply_sparselora",
    "estimator_factors",
    "find_state",
    "remove_sparselora",
    "selection",
    "set_step",
    "shared_masks",
    "sparse_tokens",
]
