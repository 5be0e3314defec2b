"""What an objective needs of the schedule, read off the trainer's arguments."""

from __future__ import annotations

import inspect
import logging
import sys
from typing import Any

from ..layers.context import SparseContext

log = logging.getLogger(__name__)

_GENERATES = ("steps_per_generation", "num_iterations", "beta")
"""What the arguments of TRL's GRPO and RLOO have, and no others."""


def begin_objective(args: Any, context: SparseContext) -> None:
    """Set ``context`` for the objective of a trainer with ``args``, as training begins.

    GRPO and RLOO measure a generation batch without gradients, then train on its rows in another order, in
    ``steps_per_generation * num_iterations`` micro-batches: these share their masks. A trainer that reads the logits of
    every position gets them.

    Raises:
        ValueError: DPO or KTO whose reference was computed before, densely.
    """
    check_reference(args, context)
    generation = 0
    if all(hasattr(args, name) for name in _GENERATES):
        generation = (args.steps_per_generation or 1) * args.num_iterations
    context.sharing.reset(generation)
    if context.skip_unused_logits and _reads_logits(args):
        log.info("this SFTTrainer reads the logits of every position for its metrics: none are left out")
        context.skip_unused_logits = False


def _reads_logits(args: Any) -> bool:
    """Whether these are the arguments of an SFTTrainer that takes entropy and accuracy from the model's logits.

    TRL's did before 1.16; since then it asks for no more than the loss.
    """
    trainer: Any = getattr(sys.modules.get("trl.trainer.sft_trainer"), "SFTTrainer", None)
    if trainer is None or "SFTConfig" not in (kind.__name__ for kind in type(args).__mro__):
        return False
    whole = "entropy_from_logits" in inspect.unwrap(trainer.compute_loss).__code__.co_names
    return whole and args.loss_type != "chunked_nll" and not args.use_liger_kernel


def check_reference(args: Any, context: SparseContext) -> None:
    """Raises ValueError for a reference that is dense while the policy is sparse, unless that was asked for."""
    if getattr(args, "precompute_ref_log_probs", False) and context.enabled and context.sparse_references:
        raise ValueError(
            "precompute_ref_log_probs=True computes the reference before training, densely, and the policy is sparse: "
            "margins and loss would measure the sparsity. Leave it out, so that the reference is computed as the "
            'policy is; or set reference: "dense" in the sparsity config to compare with a dense reference on purpose'
        )
