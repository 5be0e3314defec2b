"""What a choice of channels costs: the share of dense LoRA's FLOPs that a training step executes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from ..codecs import codec_of
from ..config.run import RunConfig
from ..config.sparse import SparseLoRAConfig
from ..method.flops import FlopModel, LayerShare
from ..plan.modules import build_tree
from ..plan.shapes import ModelShape
from ..plan.work import flop_model
from .sample import DataShape

Site = tuple[int, str]
"""Layer, group."""


class Budget:
    """FLOPs of training on a dataset, by the kept channels of each site; sites that are not named are dense.

    Args:
        shape: of the model.
        config: gives the adapter, the estimator's rank, and whether the LM head skips positions without labels.
        data: what the model is trained on.
    """

    def __init__(self, shape: ModelShape, config: RunConfig, data: DataShape) -> None:
        plain = replace(config, sparse_lora=SparseLoRAConfig(enabled=False, rank=config.sparse_lora.rank))
        tree = build_tree(shape, plain, codec_of(config.model, config.quantization), torch.float32)
        self._model: FlopModel = flop_model(shape, plain, tree)
        self._counts = shape.channels
        self._data = data
        self._logits = data.labels if config.sparse_lora.skip_unused_logits else None
        self.dense = self._model.dense(data.tokens, data.length)

    def executed(self, keep: Mapping[Site, int]) -> float:
        """FLOPs of one pass over the data, forward and backward."""
        shares: list[dict[str, float]] = [{} for _ in self._model.layers]
        for (layer, group), channels in keep.items():
            shares[layer][group] = channels / self._counts[layer][group]
        model = replace(self._model, layers=tuple(LayerShare(**share) for share in shares))
        dense, context = self._data.tokens - self._data.context, self._data.context
        return model.executed(dense, context, self._data.length, self._logits)

    def share(self, keep: Mapping[Site, int]) -> float:
        """:meth:`executed` as a share of dense LoRA's."""
        return self.executed(keep) / self.dense

    def saving(self, site: Site, channels: int) -> float:
        """FLOPs that keeping ``channels`` at ``site`` saves; savings add up.

        Where the LM head skips positions without labels, the last layer runs q, o and FFN at label positions only,
        dense: its FFN then saves nothing, its attention only in k and v.
        """
        return self.executed({}) - self.executed({site: channels})

    def check(self, target: float, keeps: Mapping[Site, Iterable[int]]) -> None:
        """Refuse a target that no choice among ``keeps``, channels by site, meets, or that needs none.

        Raises:
            ValueError: with the range that can be reached.
        """
        # The fewest channels save most, unless the estimator costs more than is left out.
        fewest = {site: min(channels) for site, channels in keeps.items()}
        lowest = {site: channels for site, channels in fewest.items() if self.saving(site, channels) > 0}
        low, high = self.share(lowest), self.share({})
        if low <= target < high:
            return
        share = self._data.context / max(self._data.tokens, 1)
        reach = (
            f"with these groups and levels, and {share:.1%} of the tokens being context, the executed share can be "
            f"{low:.4f} to {high:.4f} of dense LoRA's FLOPs"
        )
        last = (len(self._counts) - 1, "ffn")
        if self._logits is not None and last in fewest and self.saving(last, fewest[last]) <= 0:
            reach += " (the last layer's FFN runs at label positions only, and saves nothing)"
        advice = "raise the target, or allow more groups or higher levels" if target < low else "nothing needs sparsity"
        raise ValueError(f"--target-flops {target:g} cannot be met: {reach}; {advice}")
