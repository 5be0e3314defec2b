"""What a plan counts: parameters, modules as the engines' hooks see them, and the tree of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

Kind = Literal["weights", "scales", "factors", "lora"]


@dataclass(frozen=True, slots=True, eq=False)
class Parameter:
    """A parameter's shape; compared by identity, so that a tied one is itself in both places."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind
    values: int = 0
    """Of a frozen matrix that its codes stand for."""

    @property
    def trainable(self) -> bool:
        return self.kind == "lora"

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(slots=True, eq=False)
class Module:
    """A module as the engines' hooks see it."""

    name: str
    parameters: list[Parameter] = field(default_factory=list)
    """Its own."""
    children: list[Module] = field(default_factory=list)
    """In the order in which they run."""
    external: list[Parameter] = field(default_factory=list)
    """A child's parameters that its own forward reads: ZeRO-3 gathers them before the child runs."""
    leaf: bool = False
    """ZeRO-3 gathers everything below at once and sets no hooks there."""
    gives_grad: bool = False
    """Its output needs a gradient even if its input does not (LoRA)."""
    by_name: bool = False
    """Called with keyword arguments only, so that ZeRO-3's hook behind its backward never fires."""
    first_forward_only: bool = False
    """Does not run in recomputation, nor in backward (the estimator)."""
    read_in_backward: bool = True
    """Its backward reads its weights. FSDP2 gathers a unit that says no for the forward only."""

    def walk(self) -> Iterator[Parameter]:
        yield from self.parameters
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True, slots=True)
class Tree:
    """A model."""

    embedding: Module
    layers: list[Module]
    norm: Module
    head: Module

    @property
    def ends(self) -> list[Module]:
        """FSDP2's units beside the layers: embedding and head; one where they are tied, for as long as the head's."""
        return [self.head] if self.embedding.parameters == self.head.parameters else [self.embedding, self.head]

    def root_parameters(self) -> list[Parameter]:
        """What is in no decoder layer, a tied head once."""
        found = [*self.embedding.parameters, *self.norm.parameters, *self.head.parameters]
        return list(dict.fromkeys(found))

    def parameters(self) -> list[Parameter]:
        return [*self.root_parameters(), *(p for layer in self.layers for p in layer.walk())]
