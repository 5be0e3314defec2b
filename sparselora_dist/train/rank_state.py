"""What a checkpoint keeps of every single rank: random states, kept masks, an 8-bit optimizer's codes."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from ..engines import Engine
from ..engines.optimizers import under
from ..io.checkpoint import Checkpoint
from ..layers.context import SparseContext
from ..sync.everyone import everyone

log = logging.getLogger(__name__)


def gather_rank_state(engine: Engine, context: SparseContext) -> dict[str, Tensor]:
    """``<rank>/<name>`` of all ranks, on every rank. A collective."""
    mine = {"rng/cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        mine["rng/cuda"] = torch.cuda.get_rng_state(engine.device)
    mine |= {f"mask/{name}": mask.cpu() for name, mask in context.held.state_dict().items()}
    mine |= {f"optim/{name}": codes for name, codes in engine.own_codes().items()}
    told = everyone(mine) if dist.is_initialized() else [mine]
    return {f"{rank}/{name}": tensor for rank, state in enumerate(told) for name, tensor in state.items()}


def own_rank_state(resumed: Checkpoint, engine: Engine, context: SparseContext) -> dict[str, Tensor]:
    """What of it this rank continues with, by name; at another number of ranks masks that all ranks share, at most."""
    saved, now = resumed.state.world_size, engine.ranks.world_size
    if saved == now:
        return resumed.rank(engine.ranks.rank)
    log.warning("resuming a run of %d ranks on %d: random states start anew", saved, now)
    shared = resumed.rank(0) if context.sync.mode == "global" else {}
    return {name: tensor for name, tensor in shared.items() if name.startswith("mask/")}


def set_rank_state(mine: dict[str, Tensor], engine: Engine, context: SparseContext) -> None:
    """Random states and masks of :func:`own_rank_state`."""
    if "rng/cpu" in mine:
        torch.set_rng_state(mine["rng/cpu"])
    if "rng/cuda" in mine and engine.device.type == "cuda":
        torch.cuda.set_rng_state(mine["rng/cuda"], engine.device)
    context.held.load_state_dict({name: mask.to(engine.device) for name, mask in under("mask/", mine).items()})
