"""The order in which ZeRO-3's hooks run in a micro-batch: forward, recomputation and backward of every module.

As measured with DeepSpeed 0.19.8. Backward is the forward in reverse, where there are gradients at all: without
checkpointing it ends at the first adapter. Recomputation runs hooks too. Reentrant checkpointing recomputes a layer ahead
of its backward; non-reentrant checkpointing does so inside the backward of the layer's last matrix, when that asks for
what it saved, and stops as soon as it has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .parts import Module, Tree

Checkpointing = Literal["none", "reentrant", "non-reentrant"]


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
