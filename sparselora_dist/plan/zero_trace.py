"""What ZeRO-3 fetches in a micro-batch: DeepSpeed's coordinator, replayed over the modules of a model.

DeepSpeed gathers a module's own parameters ahead of its forward and ahead of its backward and lets go of them behind
each, unless they come up again within ``stage3_max_reuse_distance`` elements or were skipped by prefetching. What a step
gathers is therefore no multiple of the model: this is the steady state, with the recorded trace in use (from the second
micro-batch on). Two rules of checkpointing matter, and both were measured with DeepSpeed 0.19.8:

- recomputation fetches again, and frozen parameters it fetched stay until the module whose backward asked for it ends;
- non-reentrant checkpointing runs inside the backward of the layer's last matrix, so that the others are fetched a third
  time for their own backward; reentrant checkpointing runs before the layer's backward and keeps them for it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .modules import Module, Parameter, Tree

Checkpointing = Literal["none", "reentrant", "non-reentrant"]
_BEFORE = -1
"""Step that no fetch has: DeepSpeed's mark of a parameter that was never fetched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroLimits:
    """DeepSpeed's own settings, in elements. The defaults are DeepSpeed's where its JSON says nothing."""

    persistence: int = 100_000
    """Parameters up to this size stay gathered from one optimizer step to the next."""
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    prefetch: int = 50_000_000


@dataclass(frozen=True, slots=True)
class Event:
    """A hook that runs: ahead of (``enter``) or behind a module's forward or backward."""

    enter: bool
    forward: bool
    module: Module
    replayed: bool = False
    """A forward in recomputation."""


def events(tree: Tree, checkpointing: Checkpointing) -> list[Event]:
    """The hooks of one micro-batch, in order."""
    # PEFT's wrappers and the model: no parameters, but each visit lets DeepSpeed prefetch.
    outer = [Module(name, by_name=True) for name in ("", "base_model", "base_model.model")]
    stack = Module("base_model.model.model", by_name=True)
    trace = [Event(True, True, module) for module in (*outer, stack)]
    for module in (tree.embedding, Module("rotary_emb"), *tree.layers, tree.norm):
        trace += _forward(module)
    trace += [Event(False, True, stack), *_forward(tree.head)]
    trace += [Event(False, True, module) for module in reversed(outer)]

    trace += [Event(True, False, module) for module in outer]
    trace += [*_both(tree.head), Event(True, False, stack), *_both(tree.norm)]
    # Checkpointing makes the embedding's output need a gradient; without it, backward ends at the first adapter.
    inputs, grads = [], checkpointing != "none"
    for layer in tree.layers:
        inputs.append(grads)
        grads = _output_grad(layer, grads)
    for layer, grad in reversed(list(zip(tree.layers, inputs))):
        trace += _layer_backward(layer, grad, checkpointing)
    if checkpointing != "none":
        trace.append(Event(True, False, tree.embedding))
    return trace


def _both(module: Module) -> list[Event]:
    return [Event(True, False, module), Event(False, False, module)]


def _forward(module: Module, replayed: bool = False) -> Iterator[Event]:
    if replayed and module.first_forward_only:
        return
    yield Event(True, True, module, replayed)
    for child in () if module.leaf else module.children:
        yield from _forward(child, replayed)
    yield Event(False, True, module, replayed)


def _output_grad(module: Module, grad: bool) -> bool:
    """Whether a module's output needs a gradient where its input does (not)."""
    if grad or module.gives_grad:
        return True
    return any(_output_grad(child, False) for child in module.children)


def _backward(module: Module, grad: bool) -> Iterator[Event]:
    """Reverse order of the forward: autograd runs the newest node first."""
    if module.first_forward_only or not _output_grad(module, grad):
        return
    yield Event(True, False, module)
    if not module.leaf:
        yield from _children_backward(module, grad)
    if grad and not module.by_name:
        yield Event(False, False, module)


def _children_backward(module: Module, grad: bool) -> Iterator[Event]:
    names = [child.name.rsplit(".", 1)[-1] for child in module.children]
    before = grad
    found = []
    for name, child in zip(names, module.children):
        if "o_proj" in names:
            # q, k and v (and their norms) read the layer's input; o reads what any of them gave.
            q_or_k = {"q_norm": "q_proj", "k_norm": "k_proj"}.get(name)
            if q_or_k:
                own = _output_grad(module.children[names.index(q_or_k)], before)
            else:
                own = grad if name == "o_proj" else before
        elif "base_layer" in names:
            own = before or name == "lora_B"
        elif "up_proj" in names:
            own = grad if name == "down_proj" else before
            own = _output_grad(module.children[0], before) if name == "act_fn" else own
        else:
            own = grad
        found.append((child, own))
        if not child.first_forward_only:
            grad = _output_grad(child, own) or grad
    for child, own in reversed(found):
        yield from _backward(child, own)


def _layer_backward(layer: Module, grad: bool, checkpointing: Checkpointing) -> Iterator[Event]:
    own = list(_backward(layer, grad))
    if checkpointing == "none":
        yield from own
        return
    again = [event for child in layer.children for event in _forward(child, replayed=True)]
    if checkpointing == "reentrant":
        yield from (*own[:1], *again, *own[1:])
        return
    # The first node that reads a saved tensor starts the recomputation, which ends once that tensor is there: inside
    # the forward of the last module that has parameters.
    start = next(i for i, event in enumerate(own) if event.module.parameters or event.module.leaf)
    last = own[start].module
    end = next(i for i, event in enumerate(again) if event.enter and event.module is last)
    yield from (*own[: start + 1], *again[: end + 1], *own[start + 1 :])


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a step gathers and holds, as numbers of gathers by parameter."""

    counts: dict[Parameter, int]
    """Gathers of each parameter that does not persist, in one optimizer step."""
    peak: list[Parameter]
    """What is gathered, and does not persist, at the moment when most is."""


def fetches(tree: Tree, limits: ZeroLimits, checkpointing: Checkpointing, micro_batches: int) -> Fetched:
    """Gathers of one optimizer step of ``micro_batches``, from the recorded trace."""
    replay = _Replay(tree, limits, events(tree, checkpointing))
    if micro_batches > 1:
        # The recorded trace is in use from the second micro-batch on. Where that one ends the first step, it starts
        # without what persists, and DeepSpeed keeps what it decides then.
        replay.start(set())
        replay.run()
    replay.start(replay.persistent)
    replay.run()
    first = dict(replay.counts)
    if micro_batches > 1:
        replay.run()  # Starts with what the first left; all others start alike.
        first = {p: n + (replay.counts[p] - n) * (micro_batches - 1) for p, n in first.items()}
    return Fetched(first, replay.peak)


class _Replay:
    """The state of DeepSpeed's ``PartitionedParameterCoordinator`` with a complete trace."""

    def __init__(self, tree: Tree, limits: ZeroLimits, trace: list[Event]) -> None:
        self.limits, self.trace = limits, trace
        everything = dict.fromkeys(tree.parameters())
        self.counts = dict.fromkeys(everything, 0)
        self.persistent = {p for p in everything if p.numel <= limits.persistence}
        self._decided: dict[tuple[Module, int], set[Parameter]] = {}
        self.peak: list[Parameter] = []
        self._peak_bytes = 0
        self.own: dict[Module, list[Parameter]] = {}
        self.below: dict[Module, list[Parameter]] = {}
        visits = [event.module for event in trace if event.enter]
        for module in visits:
            if module not in self.own:
                below = [*dict.fromkeys(module.walk()), *module.external]
                self.below[module] = below
                self.own[module] = below if module.leaf else [*module.parameters, *module.external]
        self.order = [(p, step) for step, m in enumerate(visits) for p in dict.fromkeys(self.own[m])]
        # DeepSpeed looks ahead with the recursion of the module that it lets go of: a leaf sees all below, others own.
        own = {m: [*m.parameters, *m.external] for m in self.own}
        self._ahead = {leaf: _Ahead(visits, self.below if leaf else own) for leaf in (False, True)}

    def start(self, available: set[Parameter]) -> None:
        """Begin to count, with ``available`` gathered."""
        self.counts = dict.fromkeys(self.counts, 0)
        self.available = set(available)
        self.bytes = 0

    def run(self) -> None:
        """One micro-batch."""
        self.step, self.live = 0, 0
        self.queue = deque(self.order)
        self.fetched_for: dict[Parameter, int] = {}
        self.active: dict[Parameter, set[Module]] = {p: set() for p in self.counts}
        self.recomputed: dict[Module, dict[Parameter, None]] = {}
        self.backward: dict[Module, None] = {}
        for event in self.trace:
            if event.enter:
                self._fetch(event)
            else:
                self._release(event.module, event.forward)
        # Hooks behind the backward of a module whose input needs no gradient never ran.
        for module in list(self.backward):
            self._drop(module, {*self.own[module], *self.recomputed.pop(module, ())} - self.persistent)
        # Prefetched for nothing, if anything is left of it, goes at the next forward.

    def _gather(self, parameters: list[Parameter]) -> None:
        for p in parameters:
            self.counts[p] += 1
            self.live += p.numel
            self.bytes += 0 if p in self.persistent else p.numel * p.dtype.itemsize
        self.available.update(parameters)
        if self.bytes > self._peak_bytes:
            self._peak_bytes = self.bytes
            self.peak = [p for p in self.available if p not in self.persistent]

    def _fetch(self, event: Event) -> None:
        module, wanted = event.module, list(dict.fromkeys(self.own[event.module]))
        if not event.forward:
            self.backward[module] = None
        self._gather([p for p in wanted if p not in self.available])
        owner = next(reversed(self.backward)) if event.replayed and self.backward else None
        for p in wanted:
            self.active[p].add(module)
            if owner is not None and not p.trainable:
                self.recomputed.setdefault(owner, {})[p] = None
                self.active[p].add(owner)
        new = sum(self.fetched_for.get(p, _BEFORE) < self.step for p in wanted)
        seen: set[Parameter] = set()
        while self.queue and len(seen) < new:
            p, step = self.queue.popleft()
            self.fetched_for[p] = step
            seen.add(p)
        self._prefetch()
        self.step += 1

    def _prefetch(self) -> None:
        room = min(self.limits.max_live - self.live, self.limits.prefetch)
        ahead: dict[Parameter, None] = {}
        size = 0
        while self.queue and size < room:
            p, step = self.queue.popleft()
            self.fetched_for[p] = max(self.fetched_for.get(p, _BEFORE), step)
            if p not in self.available and p not in ahead:
                ahead[p] = None
                size += p.numel
        self._gather(list(ahead))

    def _release(self, module: Module, forward: bool) -> None:
        own = set(self.own[module])
        going = set(self._going(module))
        if not forward:
            extra = self.recomputed.pop(module, {})
            going.update(p for p in extra if p not in self.persistent)
            own.update(extra)
            self.backward.pop(module, None)
        self._drop(module, going, own)

    def _going(self, module: Module) -> set[Parameter]:
        """What is let go of at this step: decided when the step is reached for the first time, and kept by DeepSpeed."""
        known = self._decided.get((module, self.step))
        if known is None:
            ahead, distance = self._ahead[module.leaf], self.limits.max_reuse
            known = {
                p
                for p in self.own[module]
                if p not in self.persistent
                and self.fetched_for.get(p, _BEFORE) <= self.step
                and not ahead.within(p, self.step, distance)
            }
            self._decided[module, self.step] = known
        return known

    def _drop(self, module: Module, going: set[Parameter], own: set[Parameter] | None = None) -> None:
        for p in own if own is not None else going:
            self.active[p].discard(module)
            if p in going and p in self.available and not self.active[p]:
                self.available.discard(p)
                self.live -= p.numel
                self.bytes -= 0 if p in self.persistent else p.numel * p.dtype.itemsize


class _Ahead:
    """Whether a parameter comes up again within so many elements of a step."""

    def __init__(self, visits: list[Module], parameters: dict[Module, list[Parameter]]) -> None:
        sizes = {module: sum(p.numel for p in found) for module, found in parameters.items()}
        self.before = [0]
        self.steps: dict[Parameter, list[int]] = {}
        for step, module in enumerate(visits):
            self.before.append(self.before[-1] + sizes[module])
            for p in dict.fromkeys(parameters[module]):
                self.steps.setdefault(p, []).append(step)

    def within(self, parameter: Parameter, step: int, distance: int) -> bool:
        steps = self.steps.get(parameter, [])
        at = bisect_left(steps, step)
        return at < len(steps) and self.before[steps[at]] - self.before[step] < distance
