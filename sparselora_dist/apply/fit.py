"""Whether a model's family fits a run, and how: seen on a model in small, before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ..config import ConfigError
from ..config.run import RunConfig
from ..layers.miniature import cannot_pack, without_weights
from ..layouts import DecoderLayer, check_causal, check_known, decoder_layers


def fit_run(config: RunConfig, base: Any) -> tuple[RunConfig, str]:
    """The run, with padded micro-batches where rows of the model's family cannot be packed; and why, or nothing.

    Args:
        config: the run.
        base: the base model's config.

    Raises:
        UnsupportedModelError: no layer of the family has anything that can be sparse.
        ConfigError: the run asks for packed rows itself, and they cannot be; it adapts a parameter that is no matrix of
            routed experts.
    """
    if small := without_weights(base):
        layers = decoder_layers(small)
        check_known(small, layers)
        check_causal(small)
        _check_parameters(config.lora.values.get("target_parameters") or [], layers)
    reason = cannot_pack(base) if config.packing else None
    if reason is None:
        return config, ""
    if config.data.packing:
        raise ConfigError(
            f"'data.packing' is true, but rows of a {base.model_type!r} cannot be laid in one line: {reason}. Set it to "
            "false or null: rows are then padded"
        )
    return replace(config, data=replace(config.data, packing=False)), reason


def _check_parameters(asked: list[str], layers: list[DecoderLayer]) -> None:
    banks = [f"{layer.path}.{layer.experts.path}" for layer in layers if layer.experts]
    paths = [f"{bank}.{name}" for bank in banks for name in ("gate_up_proj", "down_proj")]
    # The model in small has fewer layers.
    numberless = {re.sub(r"\.\d+\.", ".N.", path) for path in paths}
    for name in asked:
        wanted = re.sub(r"(^|\.)\d+\.", r"\1N.", name)
        if not any(path == wanted or path.endswith(f".{wanted}") for path in numberless):
            there = sorted({path.split(".", 3)[-1] for path in paths})
            allowed = (
                f"allowed: {', '.join(there)}" if there else "this model has no routed experts: use target_modules"
            )
            raise ConfigError(
                f"'lora.target_parameters' holds {name!r}, which is no matrix of routed experts; {allowed}"
            )
