"""What a rank holds, before, in and after a step, of a model whose weights are far larger than its activations."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparselora_dist import SparseLoRAConfig, apply_sparselora, remove_sparselora, selection
from sparselora_dist.engines import Engine
from sparselora_dist.sharding.parameters import full_tensor, is_dtensor, is_zero3

from .engine_parts import SPARSE, close, make_engine, refusal, run_config, train_step
from .models import ATTENTION, FUSED, batch, tiny_base, tiny_lora

# Weights far larger than any activation, so that size alone tells them apart; all widths but one are odd.
WIDE = {
    "hidden_size": 99,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 209,
    "vocab_size": 16,
}
TOKENS = 8
KEPT_AT_LEAST = 24 * 99
"""Elements of the smallest slice of kept rows (k: 0.75 of 32 rows)."""


def wide_model(dtype: torch.dtype = torch.float32, autocast: bool = True, fused: bool = False) -> Any:
    base = tiny_base("phi3" if fused else "llama", dtype=dtype, **WIDE)
    targets = FUSED["phi3"] if fused else ATTENTION
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora, autocast_adapter_dtype=autocast).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    layers = {group: {"0-2": 0.25} for group in ("ffn", "qk", "vo")}
    return apply_sparselora(model, SparseLoRAConfig.from_dict({"layers": layers, "rank": 4}))


def wide_batch(seed: int = 0) -> dict[str, Tensor]:
    return batch(dist.get_world_size(), TOKENS, seed=seed, vocabulary=16, padding=False)


def held(model: Any) -> dict[str, dict[str, Any]]:
    """What this rank holds of every frozen parameter."""
    buffers = dict(model.named_buffers())
    result = {}
    for name, p in model.named_parameters():
        if is_zero3(p):
            local, shape, free = p.ds_tensor.numel(), tuple(p.ds_shape), p.ds_status.name == "NOT_AVAILABLE"
            free = free and p.numel() == 0
        elif is_dtensor(p):
            local, shape, free = p.to_local().numel(), tuple(p.shape), True
        else:
            local, shape, free = p.numel(), tuple(p.shape), False
        result[name] = {
            "local": local,
            "shape": shape,
            "sharded": free,
            "dtensor": is_dtensor(p),
            "dtype": (p.ds_tensor if is_zero3(p) else p).dtype,
            "trainable": p.requires_grad,
            "buffer": name in buffers,
        }
    return result


class Saved:
    """What autograd keeps.

    A hook that returned its argument would keep the old memory of a partitioned parameter alive, so a parameter is
    packed as itself, as autograd does without hooks.
    """

    def __init__(self, model: Any) -> None:
        self.parameters = [p for p in model.parameters() if is_zero3(p)]
        self.storages: dict[int, tuple[tuple[int, ...], Any]] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        for p in self.parameters if tensor.numel() else ():
            if p.data_ptr() == tensor.data_ptr() and p.shape == tensor.shape:
                return p
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = (tuple(tensor.shape), storage)
        return tensor

    def large(self) -> list[tuple[int, ...]]:
        """Shapes of what is still allocated and as large as a slice of weights."""
        return [shape for shape, storage in self.storages.values() if storage.nbytes() >= 4 * KEPT_AT_LEAST]


def memory(engine: Engine, model: Any, sparse: bool) -> dict[str, Any]:
    """After a forward and before its backward: what is whole, and what autograd keeps."""
    from torch.distributed.fsdp import FSDPModule

    model._sparselora.context.enabled = sparse
    mine = {name: t[engine.ranks.rank :: engine.ranks.world_size] for name, t in wide_batch().items()}
    saved = Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        loss = engine.model(**mine, use_cache=False, num_items_in_batch=4.0).loss
    between = held(model)
    seen = {
        "sparse": bool(selection(model)),
        "whole between": [name for name, p in between.items() if not p["sharded"]],
        "saved": len(saved.storages),
        "large": saved.large(),
        # FSDP2 keeps the sharded DTensor registered; the gathered one is freed with its storage.
        "gathered": [
            str(p._sharded_param.shape)
            for module in model.modules()
            if isinstance(module, FSDPModule)
            for p in module._get_fsdp_state()._fsdp_param_group.fsdp_params
            if p.sharded_state.name == "UNSHARDED"
        ],
    }
    engine.backward(loss, last=True)
    engine.step()
    return seen


def sharding(name: str) -> dict[str, Any]:
    engine = make_engine(run_config(name))
    model = wide_model()
    engine.prepare(model)
    seen: dict[str, Any] = {"start": held(model)}
    train_step(engine, wide_batch())
    train_step(engine, wide_batch(1))
    seen["after steps"] = held(model)
    seen["memory"] = memory(engine, model, sparse=True)
    seen["memory dense"] = memory(engine, model, sparse=False)
    for label, call in (
        ("remove", lambda: remove_sparselora(model)),
        ("apply again", lambda: apply_sparselora(model, SparseLoRAConfig.from_dict(SPARSE))),
    ):
        seen[label] = refusal(call)
    close(engine)
    engine = make_engine(run_config(name))
    model = wide_model(fused=True)
    engine.prepare(model)
    seen["memory fused"] = memory(engine, model, sparse=True)
    close(engine)
    engine = make_engine(run_config(name, dtype="bfloat16"))
    model = wide_model(torch.bfloat16, autocast=name != "zero3")
    engine.prepare(model)
    loss, norm = train_step(engine, wide_batch())
    seen["bf16"] = {"held": held(model), "loss": loss, "norm": norm, "masters": engine.full_parameters()}
    close(engine)
    return seen


def apply_after_fully_shard() -> str:
    engine = make_engine(run_config("fsdp2"))
    model = tiny_lora()
    engine.prepare(model)
    message = refusal(lambda: apply_sparselora(model, SparseLoRAConfig.from_dict(SPARSE)))
    close(engine)
    return message


def family_names() -> dict[str, Any]:
    """State dicts of a sharded model without a wrapper, whole and in shards, and another's loaded into it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    plain, other = (tiny_base(seed=seed).requires_grad_(False) for seed in (0, 5))
    model = apply_sparselora(copy.deepcopy(plain).train(), SparseLoRAConfig.from_dict(SPARSE))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    whole = StateDictOptions(full_state_dict=True)
    seen = {"plain": plain.state_dict(), "whole": get_model_state_dict(model, options=whole)}
    seen["shards"] = {name: full_tensor(value) for name, value in get_model_state_dict(model).items()}
    seen["other"] = other.state_dict()
    set_model_state_dict(model, copy.deepcopy(other.state_dict()), options=whole)
    seen["loaded"] = get_model_state_dict(model, options=whole)
    return seen
