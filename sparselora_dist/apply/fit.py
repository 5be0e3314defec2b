"""Whether a model's family fits a run, and how: seen on a model in small, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import ConfigError
from ..config.run import RunConfig
from ..layers.miniature import cannot_pack, without_weights
from ..layouts import check_causal, check_known, decoder_layers


def fit_run(config: RunConfig, base: Any) -> tuple[RunConfig, str]:
    """The run, with padded micro-batches where rows of the model's family cannot be packed; and why, or nothing.

    Args:
        config: the run.
        base: the base model's config.

    Raises:
        UnsupportedModelError: no layer of the family has anything that can be sparse.
        ConfigError: the run asks for packed rows itself, and they cannot be.
    """
    if small := without_weights(base):
        check_known(small, decoder_layers(small))
        check_causal(small)
    reason = cannot_pack(base) if config.packing else None
    if reason is None:
        return config, ""
    if config.data.packing:
        raise ConfigError(
            f"'data.packing' is true, but rows of a {base.model_type!r} cannot be laid in one line: {reason}. Set it to "
            "false or null: rows are then padded"
        )
    return replace(config, data=replace(config.data, packing=False)), reason
