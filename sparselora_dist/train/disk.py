"""Whether the output folder has room for what a run will save, seen before the model is loaded."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from ..codecs import PlainCodec
from ..config import ConfigError
from ..config.run import RunConfig
from ..plan.modules import build_tree
from ..plan.shapes import from_hf_config

log = logging.getLogger(__name__)

_FP32 = 4
_PER_RANK = 16_384
"""Bytes of random states and file headers, about."""


def check_space(config: RunConfig, base: Any, world_size: int, steps: int) -> None:
    """Compare the folder's free bytes with one checkpoint, and with all that will be kept.

    Args:
        config: the run; its ``train.output_dir`` exists.
        base: the base model's config.
        world_size: number of ranks.
        steps: steps that are still to be taken.

    Raises:
        ConfigError: not even one checkpoint fits; names the folder and both numbers of bytes.
    """
    try:
        tree = build_tree(
            from_hf_config(base.to_dict(), "config.json"), config, PlainCodec(torch.float32), torch.float32
        )
    except ConfigError as error:
        log.debug("checkpoints of this adapter are not estimated: %s", error)
        return
    elements = sum(p.numel for p in tree.parameters() if p.trainable)
    one = 3 * _FP32 * elements + world_size * _PER_RANK  # Adapter, mean and squared mean of the gradients.
    if "8bit" in (config.train.optim or ""):
        one += 2 * elements
    folder = Path(config.train.output_dir)
    free = shutil.disk_usage(folder).free
    what = f"'train.output_dir' is {folder} with {free:,} bytes free, but"
    adapter = f"(an adapter of {elements:,} parameters and its optimizer)"
    if free < one:
        raise ConfigError(f"{what} one checkpoint takes {one:,} {adapter}: make room, or name another folder")
    count = steps // config.train.save_steps if config.train.save_steps else 0
    if config.train.save_total_limit:
        count = min(count, config.train.save_total_limit + 1)  # The oldest goes when the newest is whole.
    if free < count * one + _FP32 * elements:
        log.warning(
            "%s %d checkpoints of %s bytes %s are to come: make room, or set train.save_total_limit",
            *(what, count, f"{one:,}", adapter),
        )
