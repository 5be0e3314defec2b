"""What an engine must treat as one: marks on modules, set where the model is made and read where it is sharded."""

from __future__ import annotations

from torch import nn

_UNIT = "_is_shard_unit"


def mark_unit(module: nn.Module) -> None:
    """Shard and gather the module by itself, apart from what is around it: a decoder layer."""
    setattr(module, _UNIT, True)


def unmark_unit(module: nn.Module) -> None:
    """Undo :func:`mark_unit`."""
    module.__dict__.pop(_UNIT, None)


def shard_units(model: nn.Module) -> list[nn.Module]:
    """The marked modules in their order in the model."""
    return [module for module in model.modules() if _UNIT in module.__dict__]


def gathered_together(model: nn.Module) -> list[nn.Module]:
    """Modules that read their children's parameters themselves, so that these must be there at once.

    A class says so of its instances: ``gathers_together = True``.
    """
    return [module for module in model.modules() if getattr(type(module), "gathers_together", False)]
