"""What an objective needs of the schedule, read off the trainer's arguments."""

from __future__ import annotations

from typing import Any

from ..layers.context import SparseContext

_GENERATES = ("steps_per_generation", "num_iterations", "beta")
"""What the arguments of TRL's GRPO and RLOO have, and no others."""


def begin_objective(args: Any, context: SparseContext) -> None:
    """Set ``context`` for the objective of a trainer with ``args``, as training begins.

    GRPO and RLOO measure a generation batch without gradients, then train on its rows in another order, in
    ``steps_per_generation * num_iterations`` micro-batches: these share their masks.

    Raises:
        ValueError: DPO or KTO whose reference was computed before, densely.
    """
    check_reference(args, context)
    generation = 0
    if all(hasattr(args, name) for name in _GENERATES):
        generation = (args.steps_per_generation or 1) * args.num_iterations
    context.sharing.reset(generation)


def check_reference(args: Any, context: SparseContext) -> None:
    """Raises ValueError for a reference that is dense while the policy is sparse, unless that was asked for."""
    if getattr(args, "precompute_ref_log_probs", False) and context.enabled and context.sparse_references:
        raise ValueError(
            "precompute_ref_log_probs=True computes the reference before training, densely, and the policy is sparse: "
            "margins and loss would measure the sparsity. Leave it out, so that the reference is computed as the "
            'policy is; or set reference: "dense" in the sparsity config to compare with a dense reference on purpose'
        )
