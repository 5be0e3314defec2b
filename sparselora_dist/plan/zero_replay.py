"""What ZeRO-3 fetches in a micro-batch: DeepSpeed's coordinator, replayed over the hooks of a model.

DeepSpeed gathers a module's own parameters ahead of its forward and ahead of its backward and lets go of them behind
each, unless they come up again within ``stage3_max_reuse_distance`` elements or were skipped by prefetching. What a step
gathers is therefore no multiple of the model. This is the steady state, with the recorded trace in use (from the second
micro-batch on), as measured with DeepSpeed 0.19.8. Two of its rules decide what checkpointing costs:

- frozen parameters that recomputation fetched stay until the module whose backward asked for it ends. Reentrant, that is
  the layer: they serve its backward too. Non-reentrant, that is the last matrix: the others are fetched a third time;
- what may go at a step is decided when the step is first reached, and kept for the run.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

from .parts import Module, Parameter, Tree
from .zero_trace import Checkpointing, Event, events

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
