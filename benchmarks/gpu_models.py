"""Models of published shapes with random weights, made on the device, for benchmarks/gpu.py.

A stack of some of the layers stands for the whole model: the vocabulary is cut in the same proportion, so that the LM head
and the loss keep their share of a step, and the sparse layers keep theirs. What the last layer saves at positions without
labels weighs more in a stack than in the whole model, on both sides.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from shapes import hf_config, stack
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sparselora_dist import SparseLoRAConfig, apply_sparselora
from sparselora_dist.apply import find_state
from sparselora_dist.codecs import Codec, FloatsCodec, NF4Codec
from sparselora_dist.codecs.linear import FrozenLinear
from sparselora_dist.io.factors import write_factors
from sparselora_dist.layouts import decoder_layers
from sparselora_dist.method.channels import ATTENTION, FFN, SCORED, TRANSPOSED
from sparselora_dist.plan.shapes import ModelShape

RANK = 8
LORA: dict[str, Any] = {"r": 32, "lora_alpha": 64, "target_modules": list(ATTENTION), "task_type": "CAUSAL_LM"}
"""The paper's adapter."""
CODECS: dict[str, Codec] = {"nf4": NF4Codec(), "fp8": FloatsCodec(), "fp8 decoded": FloatsCodec(compute=False)}
"""Of storages; as everywhere, fp8 is decoded where the device does not multiply it."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Sparsity of one task as published for 32 layers: ``{group: (sparsity, layers)}``."""

    name: str
    groups: dict[str, tuple[float, tuple[int, ...]]]

    def layers(self, count: int) -> dict[str, dict[str, float]]:
        """For ``count`` layers: as published for 32, else the same share of them, in front of the last layer."""
        found = {}
        for group, (sparsity, published) in self.groups.items():
            some = list(published)
            if count != 32:
                n = max(1, min(count - 1, int(len(published) / 32 * count + 0.5)))
                some = list(range(count - 1 - n, count - 1))
            found[group] = {",".join(map(str, some)): sparsity}
        return found


def _span(*ranges: tuple[int, int]) -> tuple[int, ...]:
    return tuple(layer for first, last in ranges for layer in range(first, last + 1))


_MATH, _COMMONSENSE = _span((14, 19), (21, 23), (25, 29)), _span((17, 19), (21, 23), (25, 29))
SETTINGS = {
    "math": Setting("math", {"ffn": (0.99, _span((3, 30))), "qk": (0.75, _MATH), "vo": (0.75, _MATH)}),
    "commonsense": Setting(
        "commonsense", {"ffn": (0.97, _span((17, 30))), "qk": (0.2, _COMMONSENSE), "vo": (0.2, _COMMONSENSE)}
    ),
}


def has(package: str) -> bool:
    """Whether an optional package can be imported."""
    return find_spec(package) is not None


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """As a run in one process computes: fp32 adapters, the products in ``dtype``."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def build(
    shape: ModelShape, layers: int, storage: str, *, device: torch.device, dtype: torch.dtype, length: int = 2048
) -> Any:
    """A PEFT model of ``layers`` of the shape's layers, with its adapters away from zero, in training mode.

    Args:
        storage: ``plain``; one of :data:`CODECS`; or ``bitsandbytes``, its ``Linear4bit``.
    """
    torch.manual_seed(0)
    config = hf_config(
        stack(shape, layers), max_position_embeddings=length, use_cache=False, attn_implementation="sdpa"
    )
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.requires_grad_(False)
    if storage != "plain":
        for layer in decoder_layers(model):
            for name in (*ATTENTION, *FFN):
                parent = layer.module.self_attn if name in ATTENTION else layer.module.mlp
                linear: nn.Linear = getattr(parent, name)
                if storage == "bitsandbytes":
                    made = _bitsandbytes_linear(linear, device, dtype)
                else:
                    made = _encoded_linear(linear, CODECS[storage], name in TRANSPOSED, device, dtype)
                setattr(parent, name, made)
    if storage == "bitsandbytes":
        model.is_loaded_in_4bit = True  # What PEFT looks at.
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                value = torch.empty(parameter.shape, device=device, dtype=dtype)
                value.fill_(1.0) if parameter.ndim == 1 else value.normal_(std=0.02)
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(device)
    model = get_peft_model(model, LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device, torch.float32)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    return model.train()


@cache
def _parts(codec: Codec, channels: int, length: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """One matrix, encoded: what all matrices of its shape are made of."""
    values = torch.empty(channels, length, device=device, dtype=dtype).normal_(std=0.02)
    return codec.encode(values, 0)


def forget_parts() -> None:
    """Free what encoded models are made from."""
    _parts.cache_clear()


def _encoded_linear(
    linear: nn.Linear, codec: Codec, transposed: bool, device: torch.device, dtype: torch.dtype
) -> FrozenLinear:
    """The same rows in an order of their own. Random codes instead would have a mean, because NF4's levels have one: a
    direction that every layer amplifies, and rounding with it."""
    channels, length = tuple(linear.weight.shape)[:: -1 if transposed else 1]
    order = torch.randperm(channels, device=device)
    whole = _parts(codec, channels, length, device, dtype)
    frozen = {name: nn.Parameter(part.index_select(0, order), requires_grad=False) for name, part in whole.items()}
    return FrozenLinear(linear.in_features, linear.out_features, None, codec, frozen, transposed=transposed)


def _bitsandbytes_linear(linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes

    options = {"compress_statistics": True, "quant_type": "nf4"}
    made = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, device="meta", **options
    )
    values = torch.empty(linear.weight.shape, device=device, dtype=dtype).normal_(std=0.02)
    made.weight = bitsandbytes.nn.Params4bit(values, requires_grad=False, module=made, **options).to(device)
    return made


class _RandomFactors:
    """In the place of the weights that factors are built from: the factor file has them all."""

    collective = False

    def __init__(self, shape: ModelShape, dtype: torch.dtype) -> None:
        self._shape, self.dtype = shape, dtype

    def shape(self, layer: int, name: str) -> tuple[int, int]:
        return self._shape.matrix(name)

    def get(self, layer: int, name: str) -> Tensor:
        raise AssertionError(f"no factors of layers.{layer}.{name} in the file")

    def blocks(self, layer: int, name: str) -> int:
        return 1

    def mark(self, layer: int, name: str) -> str:
        return "random"


def make_sparse(model: Any, shape: ModelShape, setting: Setting, dtype: torch.dtype) -> Any:
    """Apply a task's sparsity in place, with random factors: which channels are kept does not change the time."""
    count = model.get_base_model().config.num_hidden_layers
    layers = setting.layers(count)
    factors = {
        (layer, name): (_factor(RANK, shape.hidden, dtype), _factor(shape.matrix(name)[0], RANK, dtype))
        for layer in range(count)
        for group in ("ffn", "qk", "vo")
        for name in SCORED[group]
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "factors.safetensors"
        write_factors(path, factors, dict.fromkeys(factors, "random"), rank=RANK, model_id="random")
        config = SparseLoRAConfig.from_dict({"layers": layers, "rank": RANK, "factors": str(path)})
        return apply_sparselora(model, config, weights=_RandomFactors(shape, dtype))


def _factor(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, columns) / 8).to(dtype)


def make_pair(
    shape: ModelShape,
    layers: int,
    storage: str,
    setting: Setting,
    *,
    device: torch.device,
    dtype: torch.dtype,
    length: int,
) -> tuple[Any, Any]:
    """``(dense, sparse)``: plain PEFT LoRA with the exact savings, and SparseLoRA. Plain frozen weights are shared, but for
    those that are stored transposed."""
    dense_storage = "plain" if storage == "plain" else "bitsandbytes"
    options: dict[str, Any] = {"device": device, "dtype": dtype, "length": length}
    dense = build(shape, layers, dense_storage, **options)
    if storage == "plain":
        frozen = {id(p): p for p in dense.parameters() if not p.requires_grad}
        sparse = copy.deepcopy(dense, frozen)
    else:
        sparse = build(shape, layers, storage, **options)
    make_sparse(sparse, shape, setting, dtype)
    return credit(dense), sparse


def credit(dense: Any) -> Any:
    """Give plain PEFT LoRA the exact savings too: it runs the LM head, for one, at label positions only."""
    return apply_sparselora(dense, SparseLoRAConfig.from_dict({"enabled": False}))


def plain_copy(sparse: Any, shape: ModelShape, *, device: torch.device, dtype: torch.dtype, length: int) -> Any:
    """A dense model with exactly the weights and the adapters of ``sparse``, decoded; with the exact savings."""
    layers = sparse.get_base_model().config.num_hidden_layers
    plain = build(shape, layers, "plain", device=device, dtype=dtype, length=length)
    for ours, theirs in zip(decoder_layers(plain), decoder_layers(sparse)):
        for name in (*ATTENTION, *FFN):
            base: FrozenLinear | nn.Linear = theirs.matrix(name)
            whole = base.matrix(base.parts, dtype) if isinstance(base, FrozenLinear) else base.weight
            ours.matrix(name).weight.data.copy_(whole)
    wanted = dict(sparse.named_parameters())
    for name, parameter in plain.named_parameters():
        if name in wanted and wanted[name].shape == parameter.shape:
            parameter.data.copy_(wanted[name].data)
    return credit(plain)


def own_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, and the scales that bitsandbytes keeps beside its codes."""
    for parameter in model.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        for nested in (state, getattr(state, "state2", None)):
            if nested is not None:
                yield from (nested.absmax, nested.code)
    yield from model.buffers()


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's own tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own_tensors(model)}.values())


def sparse_state(model: Any) -> Any:
    state = find_state(model)
    assert state is not None
    return state
