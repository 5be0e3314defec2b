"""From a run's settings to a sparse PEFT model."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ..config.run import RunConfig
from ..io.adapter import is_adapted, load_adapter, put_adapter
from ..io.load import LoadReport, check_model, load_base
from ..io.start_adapter import StartAdapter
from ..layers.packed_attention import use_packed_attention
from ..sharding.placement import Placement
from .liger import use_liger
from .loftq import LoftQStart, loftq_start
from .model import apply_sparselora


def build_model(
    config: RunConfig,
    placement: Placement,
    *,
    local_ranks: int = 1,
    progress: bool = False,
    adapter: Path | None = None,
    start: StartAdapter | None = None,
    loftq: LoftQStart | None = None,
) -> tuple[Any, LoadReport]:
    """Base model, adapter and sparse layers, before the engine shards what is not sharded yet; and what loading took.

    Args:
        config: the run.
        placement: which part of the frozen weights this rank keeps.
        local_ranks: ranks that share this host's memory.
        progress: show a bar while the weights load.
        adapter: folder of an adapter to continue with, a checkpoint's.
        start: what the adapter starts from otherwise (``lora.init_from``). Under ZeRO-3 the parameters are the masters
            rounded; :meth:`Engine.load_state` gives the masters the values themselves.
        loftq: :func:`loftq_start` of the run, where it has been made; the same holds.
    """
    if config.train.use_liger_kernel:
        use_liger(check_model(config.model).model_type)
    lora = config.lora.build()
    loftq = loftq or loftq_start(config, placement, adapter)
    base = load_base(
        config.model,
        config.quantization,
        placement,
        whole=partial(is_adapted, lora),
        shift=loftq.shift if loftq else None,
        local_ranks=local_ranks,
        progress=progress and not config.train.disable_tqdm,
    )
    # A family that has no SDPA was given its own attention; rows in a line need ours.
    own = ("eager",) if config.packing and config.model.attn_implementation == "sdpa" else ()
    use_packed_attention(base.model, ("sdpa", *own))
    with warnings.catch_warnings():
        # PEFT asks Transformers for a name that it is about to drop.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        model = get_peft_model(base.model, lora)
    if config.engine.name == "zero3":
        # The optimizer keeps fp32 masters; elsewhere the adapter's own weights, which PEFT makes fp32, are the masters.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, config.model.dtype))
    if loftq:
        loftq.put(model)
    if adapter:
        load_adapter(model, adapter)
    elif start:
        put_adapter(model, start.tensors, start.path)
    sparse_base, timeout = config.sparse_base, config.train.ddp_timeout
    apply_sparselora(model, config.sparse_lora, sparse_base=sparse_base, weights=base.weights, timeout=timeout)
    if config.train.gradient_checkpointing or config.engine.fsdp_options().get("fsdp_activation_checkpointing"):
        # Keeping the state of the random numbers for recomputation costs host time in every layer.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": drops(model)}
        options |= config.train.gradient_checkpointing_kwargs or {}
        # Transformers' new name of it, where it has one: the old one warns.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options)
        if options["use_reentrant"]:
            model.enable_input_require_grads()
    model.train()
    return model, base.report


def drops(model: nn.Module) -> bool:
    """Whether some dropout of the model, its attention or its adapters can draw random numbers in training.

    Many families keep its probability as a number (``attention_dropout``, ``residual_dropout``, a router's
    ``jitter_noise``): who has one is taken to draw.
    """
    return any(
        (isinstance(module, _DropoutNd) and module.p > 0)
        or any(
            isinstance(value, float) and value > 0 and ("drop" in key or "jitter" in key)
            for key, value in vars(module).items()
        )
        for module in model.modules()
    )
