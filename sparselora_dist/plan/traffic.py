"""Bytes that a rank gathers and sends in one optimizer step.

A gather is counted as the bytes of its output, padding included: what the rank ends up with. On the wire a rank receives
(N - 1) / N of it.

- FSDP2 gathers every decoder layer, the embedding, the LM head (one unit where they are tied), and the rest of the model
  as one more unit, ahead of its forward and ahead of its backward; once only with ``fsdp_reshard_after_forward`` false,
  or where backward does not read it: the embedding, and the head whose loss is made in chunks. Recomputation of either
  kind adds nothing: it runs while its layer is gathered for backward.
- ZeRO-3 gathers by module, see :mod:`.zero_replay`, and what persists once behind every optimizer step.
- hpZ gathers frozen weights inside the group of the secondary copy; what trains is gathered over all ranks first, and
  again once it was used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .parts import Parameter, Tree
from .storage import Scheme
from .zero_replay import fetches
from .zero_trace import Checkpointing


@dataclass(frozen=True, slots=True)
class Traffic:
    """Per rank and optimizer step, in bytes."""

    gathered: int
    """Outputs of all gathers."""
    wire: dict[int, float]
    """Received over groups of so many ranks, gradients included: group size -> bytes. Adjacent ranks form a group. As NCCL
    moves it, by rings."""
    reduced: dict[int, float]
    """Of that, gradients that are reduce-scattered. Gloo makes an all-reduce of it: it moves them twice."""
    across: float
    """Received by gradient all-reduce between replicas, on top."""
    live: int
    """The most that is gathered at once, without what persists."""


def traffic(tree: Tree, scheme: Scheme, checkpointing: Checkpointing, micro_batches: int) -> Traffic:
    """Of one optimizer step of ``micro_batches``, in the steady state (ZeRO-3: from the second on)."""
    size = scheme.gathered_bytes
    trained = [p for p in tree.parameters() if p.trainable]
    if scheme.engine == "zero3" and scheme.shards > 1:
        gathered, first, live = _zero3(tree, scheme, checkpointing, micro_batches, size)
        # Gradients are reduced in every micro-batch, in the dtype of the parameters.
        reduced = micro_batches * sum(map(size, trained))
        wire = {scheme.world: _received(gathered + reduced, scheme.world)}
        if scheme.secondary > 1:
            inside = _received(gathered - first, scheme.secondary)
            wire = {scheme.world: _received(first + reduced, scheme.world), scheme.secondary: inside}
        return Traffic(gathered, wire, {scheme.world: _received(reduced, scheme.world)}, 0.0, live)
    gathered, live = _units(tree, scheme, micro_batches, size)
    # fp32 gradients, once a step: cut over the shards, then added over the replicas of each shard.
    reduced = 4 * sum(scheme.whole(p) for p in trained)
    replicas = scheme.world // scheme.shards
    across = 2 * _received(4 * sum(scheme.part(p) for p in trained), replicas)
    wire = {scheme.shards: _received(gathered + reduced, scheme.shards)}
    return Traffic(gathered, wire, {scheme.shards: _received(reduced, scheme.shards)}, across, live)


def _received(size: float, ranks: int) -> float:
    return size * (ranks - 1) / ranks


def _units(tree: Tree, scheme: Scheme, micro_batches: int, size: Callable[[Parameter], int]) -> tuple[int, int]:
    again = 2 if scheme.reshard else 1
    gathered = again * sum(map(size, [*tree.norm.parameters, *(p for layer in tree.layers for p in layer.walk())]))
    gathered += sum((again if end.read_in_backward else 1) * sum(map(size, end.parameters)) for end in tree.ends)
    return micro_batches * gathered, _live(tree, scheme) if scheme.engine == "fsdp2" else 0


def _live(tree: Tree, scheme: Scheme) -> int:
    """Of FSDP2, which copies a unit also where nothing is cut up."""
    size = scheme.unsharded_bytes
    layers = [sum(map(size, layer.walk())) for layer in tree.layers]
    ends = [sum(map(size, end.parameters)) for end in tree.ends]
    rest = sum(map(size, tree.norm.parameters))
    if not scheme.reshard:
        return rest + sum(ends) + sum(layers)
    # One unit is in use and, where it is moved, the next one arrives; tied ends stay from the first layer to the last.
    following = max(layers) if scheme.shards > 1 else 0
    if len(ends) == 1:
        return rest + ends[0] + max(layers) + following
    return rest + following + max(*layers, *ends)


def _zero3(
    tree: Tree, scheme: Scheme, checkpointing: Checkpointing, micro_batches: int, size: Callable[[Parameter], int]
) -> tuple[int, int, int]:
    """(gathered, of it over all ranks also with hpZ, the most at once)."""
    fetched = fetches(tree, scheme.limits, checkpointing, micro_batches)
    persistent = sum(size(p) for p in tree.parameters() if p.numel <= scheme.limits.persistence)
    gathered = persistent + sum(count * size(p) for p, count in fetched.counts.items())
    first = persistent + sum(size(p) for p, count in fetched.counts.items() if count and p.trainable)
    return gathered, first, sum(map(size, fetched.peak))
