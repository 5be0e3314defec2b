"""What the ranks of ``tests/engines`` run: tiny models through the engines, all cases of one engine in one process."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor

from sparselora_dist import SparseLoRAConfig, apply_sparselora, remove_sparselora, selection, set_step
from sparselora_dist.codecs import PlainCodec
from sparselora_dist.config import RunConfig
from sparselora_dist.engines.base import Engine, Ranks
from sparselora_dist.engines.shards import is_dtensor, is_zero3
from sparselora_dist.io import factors as factor_files
from sparselora_dist.io.load import load_base
from sparselora_dist.io.shard_files import TensorFiles
from sparselora_dist.io.weights import CheckpointWeights, ModelWeights
from sparselora_dist.method.tokens import partition_tokens

from .models import ALL_LINEAR, ATTENTION, batch, tiny_base, tiny_lora

STEPS = 4
LAYERS = {"ffn": {"0-2": 0.75}, "qk": {"1-2": 0.5}, "vo": {"0-1": 0.5}}
SPARSE = {"layers": LAYERS}
# Large enough that an update is nearly proportional to its gradient, so that close updates are close gradients.
ADAM_EPSILON = 1e-2

# name: (tiny_lora's arguments, sparse_lora's, use_reentrant or None)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool | None]] = {
    "llama": ({}, {}, None),
    "qwen2": ({"family": "qwen2"}, {}, None),
    "qwen3": ({"family": "qwen3"}, {}, None),
    "reentrant": ({}, {}, True),
    "non-reentrant": ({}, {}, False),
    "all linear": ({"targets": ALL_LINEAR}, {}, None),
    "all linear, lora_branch dense": ({"targets": ALL_LINEAR}, {"lora_branch": "dense"}, None),
    "a rank without labels": ({"targets": ALL_LINEAR}, {}, None),
    "a rank without labels, non-reentrant": ({"targets": ALL_LINEAR}, {}, False),
}


def world() -> Ranks:
    if not dist.is_initialized():
        return Ranks()
    rank, size = dist.get_rank(), dist.get_world_size()
    return Ranks(rank=rank, local_rank=rank, world_size=size, local_world_size=size)


def run_config(name: str, dtype: str = "float32", folder: str = "tiny", **train: Any) -> RunConfig:
    engine: dict[str, Any] = {"name": name}
    if name == "zero3":
        # Nothing persists, nothing is kept for reuse, nothing is fetched ahead: what is whole is in use.
        keys = ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters", "prefetch_bucket_size")
        engine["deepspeed"] = {"zero_optimization": {"stage": 3} | {f"stage3_{key}": 0 for key in keys}}
    settings = {"output_dir": "runs/tiny", "learning_rate": 1e-2, "adam_epsilon": ADAM_EPSILON, "max_grad_norm": 0.0}
    return RunConfig.from_dict(
        {
            "model": {"name_or_path": folder, "dtype": dtype},
            "data": {"train": "tiny.jsonl"},
            "train": settings | train,
            "engine": engine,
        }
    )


def make_engine(config: RunConfig) -> Engine:
    if config.engine.name == "single":
        from sparselora_dist.engines.single import SingleEngine as Kind
    elif config.engine.name == "zero3":
        _name_shared_memory()
        from sparselora_dist.engines.zero3 import Zero3Engine as Kind
    else:
        from sparselora_dist.engines.fsdp2 import FSDP2Engine as Kind
    return Kind(config, world())


def _name_shared_memory() -> None:
    """DeepSpeed names its shared memory by address and port; without them, runs side by side would use the same."""
    if "MASTER_PORT" not in os.environ:
        number = [os.getpid()]
        dist.broadcast_object_list(number, src=0)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(number[0]))


def close(engine: Engine) -> None:
    """Let go of one case's model; the process group stays for the next case."""
    if engine.config.engine.name == "zero3":
        engine.model.destroy()
    del engine.model, engine.optimizer
    gc.collect()


def train_step(engine: Engine, inputs: dict[str, Tensor], accumulation: int = 1) -> tuple[float, float]:
    """A step on a global batch, cut into micro-batches whose rows are dealt to the ranks: loss and gradient norm."""
    ranks = engine.ranks
    labels, total = partition_tokens(inputs["labels"]).loss_rows.numel(), torch.zeros(())
    for number in range(accumulation):
        mine = {name: t.chunk(accumulation)[number][ranks.rank :: ranks.world_size] for name, t in inputs.items()}
        with engine.autocast():
            loss = engine.model(**mine, use_cache=False, num_items_in_batch=labels / ranks.world_size).loss
        engine.backward(loss, last=number == accumulation - 1)
        total += loss.detach().float()
    return engine.all_sum(total.item() / ranks.world_size)[0], engine.step()


def follow(engine: Engine, model: Any, labelled: int = 1) -> dict[str, Any]:
    """STEPS optimizer steps: losses, masks, gradient norms, first gradients (from Adam's mean), parameters.

    Every ``labelled``-th row has labels.
    """
    seen: dict[str, Any] = {"loss": [], "norm": [], "masks": [], "parameters": [engine.full_parameters()]}
    for step in range(STEPS):
        inputs = batch(4, 24, seed=step)
        inputs["labels"][[row for row in range(4) if row % labelled]] = -100
        loss, norm = train_step(engine, inputs)
        seen["loss"].append(loss)
        seen["norm"].append(norm)
        seen["masks"].append(selection(model))
        seen["parameters"].append(engine.full_parameters())
        if step == 0:
            moments, _ = engine.full_moments()
            seen["gradients"] = {k: 10 * v for k, v in moments.items() if k.endswith(".exp_avg")}
    return seen


def agreement_case(name: str, case: str, **train: Any) -> dict[str, Any]:
    shape, sparse, reentrant = CASES[case]
    engine = make_engine(run_config(name, **train))
    model = apply_sparselora(tiny_lora(**shape), SparseLoRAConfig.from_dict(SPARSE | sparse))
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    engine.prepare(model)
    seen = follow(engine, model, labelled=2 if "without labels" in case else 1)
    close(engine)
    return seen


def loaded_partitioned(folder: str) -> dict[str, Any]:
    """The case "llama" with the base model streamed into partitions, as a run does it."""
    config = run_config("zero3", folder=folder)
    if dist.get_rank() == 0:
        tiny_base().save_pretrained(folder)
    dist.barrier()
    engine = make_engine(config)
    base = load_base(config.model, config.quantization, engine.placement()).model
    partitioned = all(is_zero3(p) for p in base.parameters())
    whole = apply_sparselora(tiny_lora(), SparseLoRAConfig.from_dict(SPARSE))
    adapters = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, task_type="CAUSAL_LM")).train()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert adapters.keys() == trainable.keys()
    for name, p in trainable.items():
        p.data.copy_(adapters[name])
    apply_sparselora(model, SparseLoRAConfig.from_dict(SPARSE))
    sparse_whole = [name for name, p in model.named_parameters() if not p.requires_grad and not is_zero3(p)]
    engine.prepare(model)
    seen = {"partitioned": partitioned, "not partitioned": sparse_whole, "run": follow(engine, model)}
    seen["held"], seen["names"] = held(model), list(adapters)
    close(engine)
    return seen


# --- clipping and accumulation ----------------------------------------------------------------------------------------


# name: (max_grad_norm, accumulation, sparse)
VARIANTS = {
    "whole": (0.0, 1, False),
    "parts": (0.0, 2, False),
    "clipped": (0.05, 1, False),
    "clipped parts": (0.05, 2, False),
    "sparse parts": (0.05, 2, True),
}


def variants(name: str) -> dict[str, Any]:
    """Two steps with and without clipping, in one piece and accumulated."""
    seen: dict[str, Any] = {}
    for label, (limit, accumulation, sparse) in VARIANTS.items():
        size = 4 // dist.get_world_size() // accumulation
        train = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": size}
        engine = make_engine(run_config(name, max_grad_norm=limit, **train))
        model = apply_sparselora(tiny_lora(), SparseLoRAConfig.from_dict({**SPARSE, "start_step": 1}))
        set_step(model, int(sparse), 2)
        engine.prepare(model)
        steps = [train_step(engine, batch(4, 24, seed=seed), accumulation) for seed in range(2)]
        seen[label] = {"steps": steps, "parameters": engine.full_parameters(), "count": engine.full_moments()[1]}
        close(engine)
    return seen


# --- sharding ---------------------------------------------------------------------------------------------------------

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


def wide_model(dtype: torch.dtype = torch.float32, autocast: bool = True) -> Any:
    base = tiny_base(dtype=dtype, **WIDE)
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=ATTENTION, task_type="CAUSAL_LM")
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
    engine = make_engine(run_config(name, dtype="bfloat16"))
    model = wide_model(torch.bfloat16, autocast=name != "zero3")
    engine.prepare(model)
    loss, norm = train_step(engine, wide_batch())
    seen["bf16"] = {"held": held(model), "loss": loss, "norm": norm, "masters": engine.full_parameters()}
    close(engine)
    return seen


def refusal(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "not refused"


def apply_after_fully_shard() -> str:
    engine = make_engine(run_config("fsdp2"))
    model = tiny_lora()
    engine.prepare(model)
    message = refusal(lambda: apply_sparselora(model, SparseLoRAConfig.from_dict(SPARSE)))
    close(engine)
    return message


# --- state ------------------------------------------------------------------------------------------------------------

State = tuple[dict[str, Tensor], dict[str, Tensor], int]


def state_of(engine: Engine) -> State:
    return engine.full_parameters(), *engine.full_moments()


def continue_from(name: str, state: State | None, first: int, steps: int) -> dict[str, Any]:
    """``steps`` steps of an odd-sized model from ``state`` (or the start): losses, the state as loaded and after."""
    engine = make_engine(run_config(name))
    model = wide_model()
    engine.prepare(model)
    seen: dict[str, Any] = {"fresh": state_of(engine), "losses": []}
    if state is not None:
        engine.load_state(*state)
        seen["loaded"] = state_of(engine)
    for step in range(first, first + steps):
        seen["losses"].append(train_step(engine, batch(4, TOKENS, seed=step, vocabulary=16, padding=False))[0])
    seen["state"] = state_of(engine)
    if state is None:
        # Round trip in place, after something else was there.
        kept = state_of(engine)
        train_step(engine, batch(4, TOKENS, seed=50, vocabulary=16, padding=False))
        engine.load_state(*kept)
        seen["kept"], seen["back"] = kept, state_of(engine)
        seen["next"] = train_step(engine, batch(4, TOKENS, seed=first + steps, vocabulary=16, padding=False))[0]
        seen["after next"] = state_of(engine)
    close(engine)
    return seen


# --- one process start per engine -------------------------------------------------------------------------------------


def zero3(folder: str) -> dict[str, Any]:
    state = continue_from("zero3", None, 0, 2)
    return {
        "agreement": {case: agreement_case("zero3", case) for case in CASES},
        "loaded partitioned": loaded_partitioned(folder),
        "variants": variants("zero3"),
        "sharding": sharding("zero3"),
        "state": state,
        "moved": continue_from("zero3", state["kept"], 2, 1),
    }


def fsdp2(from_zero3: State) -> dict[str, Any]:
    return {
        "agreement": {case: agreement_case("fsdp2", case) for case in CASES},
        "variants": variants("fsdp2"),
        "sharding": sharding("fsdp2"),
        "apply after": apply_after_fully_shard(),
        "state": continue_from("fsdp2", None, 0, 2),
        "moved": continue_from("fsdp2", from_zero3, 2, 1),
    }


def fsdp2_on_four() -> dict[str, Any]:
    return {case: agreement_case("fsdp2", case) for case in ("llama", "all linear")}


def single(from_zero3: State, from_fsdp2: State) -> dict[str, Any]:
    return {
        "agreement": {case: agreement_case("single", case) for case in CASES},
        "variants": variants("single"),
        "state": continue_from("single", None, 0, 2),
        "moved": continue_from("single", from_fsdp2, 3, 1),
        "reference": continue_from("single", from_zero3, 2, 2),
    }


# --- factors ----------------------------------------------------------------------------------------------------------

MATRICES = [(layer, f"{name}_proj") for layer in range(3) for name in ("gate", "k", "q", "up", "v")]
_MODEL: dict[str, Any] = {"rank": 4, "model_id": "tiny", "model_config": {"model_type": "llama"}}


def _factors(weights: Any, path: Path) -> dict[str, Any]:
    """Build into an empty cache; the result and how many matrices this rank decomposed."""
    calls: list[int] = []
    original = factor_files.low_rank_factors

    def low_rank_factors(weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(weight.numel())
        return original(weight, *args, **kwargs)

    factor_files.low_rank_factors = low_rank_factors
    try:
        os.environ[factor_files.CACHE_VARIABLE] = str(path)
        built = factor_files.load_or_build(weights, MATRICES, **_MODEL)
        first = len(calls)
        again = factor_files.load_or_build(weights, MATRICES, **_MODEL)
    finally:
        factor_files.low_rank_factors = original
    files = sorted(file.name for file in path.rglob("*.safetensors"))
    return {"factors": built, "calls": first, "again": again, "calls again": len(calls) - first, "files": files}


def _files(folder: Path) -> CheckpointWeights:
    return CheckpointWeights(TensorFiles.of_model(folder), PlainCodec(torch.float32), torch.float32)


def factors(folder: str, bad_files: dict[str, str]) -> dict[str, Any]:
    """The same factors from every kind of weights, and bad files."""
    root = Path(folder)
    seen: dict[str, Any] = {}
    plain = tiny_base()
    if dist.get_rank() == 0:
        plain.save_pretrained(root / "model")
        plain.save_pretrained(root / "pieces", max_shard_size="60KB")
    dist.barrier()
    seen["pieces"] = len(list((root / "pieces").glob("*.safetensors")))
    seen["plain"] = _factors(ModelWeights(plain), root / "plain")
    seen["files"] = _factors(_files(root / "model"), root / "files")
    seen["pieces of files"] = _factors(_files(root / "pieces"), root / "pieces-cache")

    config = run_config("zero3", folder=str(root / "model"))
    partitioned = load_base(config.model, config.quantization, make_engine(config).placement()).model
    assert all(is_zero3(p) for p in partitioned.parameters())
    seen["partitioned"] = _factors(ModelWeights(partitioned), root / "zero3")
    seen["still partitioned"] = all(p.numel() == 0 for p in partitioned.parameters())

    engine = make_engine(run_config("fsdp2"))
    sharded = tiny_base()
    engine.prepare(sharded)
    assert all(is_dtensor(p) for p in sharded.parameters())
    seen["dtensors"] = _factors(ModelWeights(sharded), root / "fsdp2")

    class Failing(CheckpointWeights):
        def get(self, layer: int, name: str) -> Tensor:
            if dist.get_rank() == dist.get_world_size() - 1:
                raise ValueError(f"cannot read layer {layer}")
            return super().get(layer, name)

    broken = Failing(TensorFiles.of_model(root / "model"), PlainCodec(torch.float32), torch.float32)
    seen["one fails"] = refusal(lambda: _factors(broken, root / "failing"))

    seen["bad"] = {}
    for name, path in bad_files.items():
        try:
            factor_files.load_or_build(ModelWeights(plain), MATRICES, path=path, **_MODEL)
            seen["bad"][name] = "accepted"
        except Exception as error:
            seen["bad"][name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    return seen
