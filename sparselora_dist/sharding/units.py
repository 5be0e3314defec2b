"""What an engine must treat as one: marks on modules, set where the model is made and read where it is sharded."""

from __future__ import annotations

from typing import Any

from torch import nn

_UNIT = "_is_shard_unit"


def mark_unit(module: nn.Module) -> None:
    """Shard and gather the module by itself, apart from what is around it: a decoder layer, the embedding, the LM head."""
    setattr(module, _UNIT, True)


def unmark_unit(module: nn.Module) -> None:
    """Undo :func:`mark_unit`."""
    module.__dict__.pop(_UNIT, None)


def shard_units(model: nn.Module) -> list[list[nn.Module]]:
    """The marked modules in their order in the model; those that share a parameter (tied embeddings) are one unit."""
    units: list[list[nn.Module]] = []
    unit_of: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if _UNIT not in module.__dict__:
            continue
        parameters = [id(p) for p in module.parameters()]
        unit = next((unit_of[key] for key in parameters if key in unit_of), None)
        if unit is None:
            units.append(unit := [])
        unit.append(module)
        unit_of.update(dict.fromkeys(parameters, unit))
    return units


def read_in_backward(module: Any, read: bool) -> None:
    """Say of a unit that its own backward reads its weights, or does not: FSDP2 then gathers none there.

    It holds for every backward that comes, until it is said anew. Nothing happens where the module is no unit of FSDP2.
    """
    say = getattr(module, "set_unshard_in_backward", None)
    if say is not None:
        say(read)


def gathered_together(model: nn.Module) -> list[nn.Module]:
    """Modules that read their children's parameters themselves, so that these must be there at once.

    A class says so of its instances: ``gathers_together = True``; or what was done to a module says so of that one.
    """

    def says_so(module: nn.Module) -> bool:
        return getattr(type(module), "gathers_together", False) or "gathers_together" in module.__dict__

    return [module for module in model.modules() if says_so(module)]
