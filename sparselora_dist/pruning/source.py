"""What is pruned: a model in its files, read layer by layer, and an adapter on it where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from ..layerwise.model_files import ModelFiles
from ..layouts import DecoderLayer
from .layer_adapter import LayerAdapter


@dataclass(frozen=True, slots=True)
class Source(ModelFiles):
    """A model and its adapter."""

    adapter: LayerAdapter | None

    @classmethod
    def of(cls, model: str, adapter: Path | None, device: torch.device) -> Source:
        """Raises:
        ConfigError: quantised weights, several dtypes; an adapter that changes more than matrices.
        ValueError, OSError: the model or the adapter cannot be read.
        """
        found = ModelFiles.open(model, device)
        own = {field.name: getattr(found, field.name) for field in fields(ModelFiles)}
        return cls(**own, adapter=LayerAdapter(adapter, found.files) if adapter else None)

    @contextmanager
    def merged(self, layer: DecoderLayer) -> Iterator[dict[str, Tensor]]:
        """The layer as it computes with the adapter; gives, by the linear's name, what is stored of those it changes."""
        with self.stream.filled(layer):
            stored = {}
            for name, linear, key in self.adapted(layer):
                assert self.adapter
                stored[name] = linear.weight.data
                linear.weight.data = self.adapter.merged(key, stored[name]).to(stored[name].dtype)
            yield stored

    def put_adapter(self, layer: DecoderLayer) -> None:
        """Under the zeros that a filled layer has now."""
        for _, linear, key in self.adapted(layer):
            assert self.adapter
            linear.weight.data = self.adapter.effective(key, linear.weight.data)

    def adapted(self, layer: DecoderLayer) -> Iterator[tuple[str, nn.Linear, str]]:
        """(name, linear, name in the files) of those of a layer that the adapter changes."""
        for name, linear in self.stream.linears(layer).items():
            key = self.stream.key(layer, f"{name}.weight")
            if self.adapter and self.adapter.touches(key):
                yield name, linear, key
