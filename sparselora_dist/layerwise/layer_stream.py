"""The decoder layers of a model that stays on the meta device, with weights one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..io.shard_files import TensorFiles
from ..io.stored_names import find_names
from ..io.weights import weight_key
from ..layouts import DecoderLayer, UnsupportedModelError, decoder_layers


class _LastLayerError(Exception):
    """Every layer has been called; what the model does after them is not needed."""


@dataclass(frozen=True, slots=True)
class Call:
    """What the model calls a decoder layer with, beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LayerStream:
    """Args:
    config: of the model.
    files: its tensors.
    dtype: that is computed in.
    device: where.
    """

    def __init__(self, config: Any, files: TensorFiles, dtype: torch.dtype, device: torch.device) -> None:
        self.files, self.dtype, self.device = files, dtype, device
        # The fused attentions know no softcap.
        attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
        with init_empty_weights(include_buffers=False):
            self.model: Any = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
        self.model.requires_grad_(False).eval()
        find_names(self.model, files)
        for path, buffer in self.model.named_buffers():
            if (key := files.renamed.get(path, path)) in files.tensors:  # A layer's scale.
                buffer.copy_(files.read(key))
        self.layers = decoder_layers(self.model)
        for layer in self.layers:
            self._check(layer)
        for module in self.model.modules():  # Rotary frequencies.
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = buffer.to(device)

    def _check(self, layer: DecoderLayer) -> None:
        known = {id(linear.weight) for linear in self.linears(layer).values()}
        others = [n for n, p in layer.module.named_parameters() if p.dim() > 1 and id(p) not in known]
        if others or not known:
            raise UnsupportedModelError(
                f"{layer.path} has {others[0] if others else 'no linear'}, which is no weight of a linear (routed experts, "
                "a router, a convolution): only layers whose weights are all linears are taken"
            )

    @staticmethod
    def linears(layer: DecoderLayer) -> dict[str, nn.Linear]:
        """The linears of a layer, by their names in it."""
        return {name: module for name, module in layer.module.named_modules() if isinstance(module, nn.Linear)}

    def key(self, layer: DecoderLayer, name: str) -> str:
        """What the files call a parameter of a layer."""
        return weight_key(self.files, f"{layer.path}.{name}")

    def keys(self, layer: DecoderLayer) -> dict[str, str]:
        """The files' name of every parameter of a layer, by its name in it."""
        return {name: self.key(layer, name) for name, _ in layer.module.named_parameters()}

    @contextmanager
    def filled(self, layer: DecoderLayer, values: dict[str, Tensor] | None = None) -> Iterator[dict[str, str]]:
        """The layer with its weights, from ``values`` by the files' names where they are given; gives the files' name of
        every parameter."""
        keys = self.keys(layer)
        for name, key in keys.items():
            self._set(layer.module, name, self._read(key) if values is None else values[key])
        try:
            yield keys
        finally:
            for name in keys:
                owner, own = _owner(layer.module, name)
                owner._parameters[own] = nn.Parameter(owner._parameters[own].to("meta"), requires_grad=False)

    def _read(self, key: str) -> Tensor:
        value = self.files.read(key)
        self.files.check_finite(key, value)
        return value

    def _set(self, module: nn.Module, name: str, value: Tensor) -> None:
        owner, own = _owner(module, name)
        if tuple(value.shape) != tuple(owner._parameters[own].shape):
            raise UnsupportedModelError(f"{name} has shape {tuple(value.shape)} in the files, not that of config.json")
        owner._parameters[own] = nn.Parameter(value.to(self.device, self.dtype), requires_grad=False)

    @torch.no_grad()
    def embed(self, sequences: Tensor) -> tuple[list[Tensor], list[Call]]:
        """What the first layer is given of each sequence, (1, length, H), and what every layer is called with.

        ``sequences`` (n, length) int64.
        """
        decoder = self.model.get_decoder()
        inside = {id(p) for layer in self.layers for p in layer.module.parameters()}
        prefix = next(path for path, module in self.model.named_modules() if module is decoder)
        for name, parameter in list(decoder.named_parameters()):
            if id(parameter) not in inside:
                key = weight_key(self.files, f"{prefix}.{name}")
                self._set(decoder, name, self._read(key))
        hidden: list[Tensor] = []
        first: list[Call] = []
        sequences = sequences.to(self.device)
        # One more, backwards, so that there are two.
        for sequence in (*sequences, sequences[0].flip(0)):
            calls: list[Call] = []
            hidden.append(self._record(decoder, sequence[None], calls))
            first = first or calls
            for one, other in zip(first, calls):
                if not _same((one.args, one.kwargs), (other.args, other.kwargs)):
                    raise UnsupportedModelError(
                        f"{type(self.model).__name__} gives its layers more that depends on the tokens than the hidden "
                        "states (an input of their own, shared keys and values): its layers cannot be run one at a time"
                    )
        return hidden[:-1], first

    def _record(self, decoder: nn.Module, ids: Tensor, calls: list[Call]) -> Tensor:
        first: list[Tensor] = []

        def recorder(index: int) -> Any:
            def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                calls.append(Call(args, kwargs))
                first.append(hidden)
                if index == len(self.layers) - 1:
                    raise _LastLayerError
                return hidden

            return forward

        for layer in self.layers:
            layer.module.__dict__["forward"] = recorder(layer.index)
        try:
            decoder(input_ids=ids, use_cache=False)
        except _LastLayerError:
            pass
        finally:
            for layer in self.layers:
                del layer.module.__dict__["forward"]
        if len(calls) != len(self.layers) or any(one is not first[0] for one in first):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not hand one layer's output to the next as it is: its layers cannot be "
                "run one at a time"
            )
        return first[0]

    @staticmethod
    @torch.no_grad()
    def run(layer: DecoderLayer, hidden: Tensor, call: Call) -> Tensor:
        """What a filled layer makes of (1, length, H)."""
        out: Any = layer.module(hidden, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out


def _same(one: Any, other: Any) -> bool:
    """Whether two calls were given the same; what a layer may write into is nobody's to share."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if type(one) is dict and one.keys() == other.keys():
        return all(_same(value, other[name]) for name, value in one.items())
    return not isinstance(one, Mapping)


def _owner(module: nn.Module, name: str) -> tuple[Any, str]:
    path, _, own = name.rpartition(".")
    return module.get_submodule(path), own
