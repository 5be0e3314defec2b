"""Single process, DeepSpeed ZeRO-3 and FSDP2 behind one interface. Each engine is touched in its own file only."""

from ..config.run import RunConfig
from .base import Engine
from .ranks import discover_ranks

__all__ = ["Engine", "make_engine"]


def make_engine(config: RunConfig) -> Engine:
    """The engine that ``engine.name`` asks for, with its process group started."""
    ranks = discover_ranks()
    # Each imports what the others do not need.
    if config.engine.name == "single":
        from .single import SingleEngine

        return SingleEngine(config, ranks)
    if config.engine.name == "zero3":
        from .zero3 import Zero3Engine

        return Zero3Engine(config, ranks)
    from .fsdp2 import FSDP2Engine

    return FSDP2Engine(config, ranks)
