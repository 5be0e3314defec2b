"""What the ranks of ``tests/sync`` run: plain data parallelism, every rank a whole copy of the model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import sparselora_dist.layers.neurons as neurons_room
import sparselora_dist.sync.masks as masks_room
import sparselora_kernels.gated_ffn as gated_ffn
from sparselora_dist import SparseLoRAConfig, apply_sparselora, selection, set_step
from sparselora_dist.apply import find_state
from sparselora_dist.sync.masks import MaskSync, MaskSyncError, Site

from .models import batch, gradients, tiny_lora

LAYERS = {"ffn": {"0-2": 0.75}, "qk": {"1": 0.5}, "vo": {"1-2": 0.5}}
PREDICTED = 2 + 2
"""Collectives of one forward: layers with ffn but for the last, which needs no mask, and layers with qk or vo."""

TIMEOUT = 5.0

Masks = dict[int, dict[str, Tensor]]


def sparse_model(mode: str = "global", timeout: float = 60.0, **settings: Any) -> Any:
    """The same tiny model with the same factors on every rank."""
    model = tiny_lora()
    config = SparseLoRAConfig.from_dict({"layers": LAYERS, "mask_sync": mode, **settings})
    return apply_sparselora(model, config, timeout=timeout)


def sync_of(model: Any) -> MaskSync:
    return find_state(model).context.sync


def rows_of(inputs: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    return {name: tensor[rows] for name, tensor in inputs.items()}


def my_rows(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every world-th row, so that each rank has short and long ones."""
    return rows_of(inputs, list(range(dist.get_rank(), len(inputs["labels"]), dist.get_world_size())))


def lopsided_batch() -> dict[str, Tensor]:
    """Of two ranks, rank 1 (odd rows) has no context token; of its two rows one is all padding but its first token."""
    inputs = batch(4, 16, seed=5, padding=False)
    inputs["labels"][1] = inputs["input_ids"][1]
    inputs["labels"][3] = -100
    inputs["labels"][3, 0] = inputs["input_ids"][3, 0]
    inputs["attention_mask"][3, 1:] = 0
    return inputs


def padded_batch() -> dict[str, Tensor]:
    """Rank 1's whole micro-batch is padding but for one context token, without any label."""
    inputs = batch(2, 16, seed=6, padding=False)
    inputs["labels"][1] = -100
    inputs["attention_mask"][1, 1:] = 0
    return inputs


def forward(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The loss with the run's normalisation (a batch without labels gives zero, not NaN)."""
    return model(**inputs, use_cache=False, num_items_in_batch=8.0).loss


def masks(model: Any, inputs: dict[str, Tensor]) -> Masks:
    forward(model, inputs)
    return selection(model)


def failure(call: Callable[[], Any]) -> str:
    """The message of the MaskSyncError that ``call`` must raise, or what it did instead."""
    try:
        call()
    except MaskSyncError as error:
        return str(error)
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    return "raised nothing"


@contextmanager
def counted() -> Iterator[list[Any]]:
    """The groups of all all-reduces that are issued meanwhile."""
    groups: list[Any] = []
    original = dist.all_reduce

    def all_reduce(*args: Any, **kwargs: Any) -> Any:
        groups.append(kwargs.get("group"))
        return original(*args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield groups
    finally:
        dist.all_reduce = original


def _collectives() -> dict[str, Any]:
    """All-reduces (patched function, own counter) of forwards, backwards, evaluation, dense steps, intervals."""
    seen: dict[str, Any] = {}
    inputs = my_rows(batch(4, 24, seed=2))
    for name, reentrant in (("none", None), ("reentrant", True), ("non-reentrant", False)):
        model = sparse_model()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with counted() as groups:
            loss = forward(model, inputs)
            after_forward = len(groups), sync_of(model).collectives
            before = selection(model)
            loss.backward()
            seen[name] = {"forward": after_forward, "whole": (len(groups), sync_of(model).collectives)}
        seen[name]["own group"] = all(
            group is not None and group is not dist.group.WORLD and dist.get_world_size(group) == dist.get_world_size()
            for group in groups
        )
        seen[name]["masks"] = before
        seen[name]["masks kept in backward"] = _equal(before, selection(model))
        seen[name]["gradients"] = gradients(model)
        # Two forwards wait for their backward: each recomputation must find its own micro-batch.
        model.zero_grad()
        other = my_rows(batch(4, 24, seed=3))
        with counted() as groups:
            (forward(model, inputs) + forward(model, other)).backward()
        seen[name]["two pending"] = len(groups)
        seen[name]["two pending gradients"] = gradients(model)

    collectives = sync_of(model).collectives
    with counted() as groups:
        model.eval()
        with torch.no_grad():
            forward(model, inputs)
        model.generate(input_ids=inputs["input_ids"][:, :4], max_new_tokens=2, do_sample=False)
        model.train()
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    seen["evaluation"] = len(groups), sync_of(model).collectives - collectives

    model = sparse_model(start_step=1, end_step=3)
    seen["schedule"] = []
    for step in range(4):
        set_step(model, step, 4)
        with counted() as groups:
            forward(model, inputs).backward()
        seen["schedule"].append(len(groups))

    for interval in (2, 3):
        model = sparse_model(interval=interval)
        per_step, chosen = [], []
        for step in range(6):
            set_step(model, step, 6)
            with counted() as groups:
                for micro in range(2):
                    chosen.append(masks(model, my_rows(batch(4, 24, seed=10 * step + micro))))
            per_step.append(len(groups))
        seen[f"interval {interval}"] = per_step
        seen[f"interval {interval} held"] = [_equal(chosen[2 * step], chosen[2 * step + 1]) for step in range(6)]
    return seen


def _equal(left: Masks, right: Masks) -> bool:
    return all(torch.equal(left[layer][group], right[layer][group]) for layer in left for group in left[layer])


def _order() -> list[str]:
    """What a sparse FFN does, in order: all-reduces, dense and context products, waits and selections."""
    model, events = sparse_model(), []
    ffn = model.get_base_model().model.layers[0].mlp
    inside = False

    def noting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if inside:
                events.append(name)
            return original(*args, **options)

        return call

    def enter(*_: Any) -> None:
        nonlocal inside
        inside = True

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    ffn.register_forward_pre_hook(enter)
    ffn.register_forward_hook(leave)
    with ExitStack() as stack:
        for owner, name, event in (
            (dist, "all_reduce", "started"),
            (gated_ffn, "product_nt", "dense"),
            (masks_room.Reduction, "wait", "waited"),
            (neurons_room, "select_checked", "selected"),
            (gated_ffn, "vendor_nt", "context"),
        ):
            stack.enter_context(mock.patch.object(owner, name, noting(event, getattr(owner, name))))
        forward(model, my_rows(batch(4, 24))).backward()
    return events


def _sharing() -> dict[str, Any]:
    """All-reduces of forwards that share masks, in order: a policy and its reference, a generation; the last masks."""
    model, inputs = sparse_model(), my_rows(batch(4, 24, seed=2))
    sharing, issued = find_state(model).context.sharing, []
    with counted() as groups:

        def count(data: dict[str, Tensor], gradients: bool) -> None:
            before = len(groups)
            with torch.set_grad_enabled(gradients):
                forward(model, data)
            issued.append(len(groups) - before)

        count(inputs, True), count(inputs, False)
        sharing.reset(generation=1)
        for seed, gradients in ((4, False), (5, False), (6, True), (7, True)):
            count(my_rows(batch(4, 24, seed=seed)), gradients)
    sync_of(model).check()
    return {"issued": issued, "masks": selection(model)}


def two_ranks() -> dict[str, Any]:
    seen: dict[str, Any] = {}
    model = sparse_model()
    seen["global"] = [masks(model, my_rows(batch(4, 24, seed=seed))) for seed in range(4)]
    for name, inputs in (("no context", lopsided_batch()), ("padding", padded_batch())):
        counts = find_state(model).context.counts
        model.zero_grad()
        counts.context = 0
        loss = forward(model, my_rows(inputs))
        loss.backward()
        seen[name] = {
            "masks": selection(model),
            "loss": loss.item(),
            "finite": all(bool(g.isfinite().all()) for g in gradients(model).values()),
            "context": counts.context,
        }
    local = sparse_model("local")
    with counted() as groups:
        seen["local"] = masks(local, my_rows(batch(4, 24)))
    seen["local collectives"] = len(groups), sync_of(local).collectives
    seen["collectives"] = _collectives()
    seen["order"] = _order()
    seen["sharing"] = _sharing()

    # Rank 1 stays away from the very first sync, where the group would be made.
    sync = MaskSync("global", 8, timeout=2.0)
    dist.barrier()
    if dist.get_rank() == 0:
        seen["missing at first"] = failure(lambda: sync.reduce(Site(0, "ffn"), torch.ones(3)))
    dist.barrier()
    return seen


def four_ranks() -> dict[str, Any]:
    seen: dict[str, Any] = {}
    rank, inputs = dist.get_rank(), batch(8, 24, seed=7)
    mine = my_rows(inputs)
    model = sparse_model(timeout=TIMEOUT)
    layers = model.get_base_model().model.layers
    dist.barrier()
    seen["global"] = masks(model, mine)

    norm = layers[1].post_attention_layernorm.weight.data
    for name, value in (("nan", float("nan")), ("inf", float("inf"))):
        healthy = norm[0].clone()
        if rank == 2:
            norm[0] = value
        seen[name] = failure(lambda: forward(model, mine))
        seen[f"{name} context closed"] = not find_state(model).context.in_forward
        norm[0] = healthy

    # Rank 1 computes layer 1's FFN densely, so that its next mask is that of layer 2. The same shape, the same group.
    mlp = layers[1].mlp
    if rank == 1:
        mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    seen["skipped"] = failure(lambda: forward(model, mine))
    mlp.__dict__.pop("forward", None)
    seen["global again"] = masks(model, mine)

    factors = [p for name, p in model.named_parameters() if "estimator" in name]
    for p in factors:
        p.data.zero_()
    seen["tied"] = masks(model, mine)

    # Two nodes of two ranks.
    os.environ["GROUP_RANK"] = str(rank // 2)
    node = sparse_model("node")
    with counted() as groups:
        seen["node"] = masks(node, mine)
    seen["node ranks"], seen["node collectives"] = sync_of(node).ranks, len(groups)
    del os.environ["GROUP_RANK"]

    # Last, because a timeout breaks the group.
    dist.barrier()
    started = time.monotonic()
    seen["missing"] = None if rank == 1 else failure(lambda: forward(model, mine))
    seen["missing seconds"] = time.monotonic() - started
    dist.barrier()
    return seen
