"""Run configs for ``tests/plan``."""

from __future__ import annotations

from typing import Any

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
# A different group in every layer, and one that is wholly dense but for its vo.
SPARSE: dict[str, Any] = {"rank": 4, "layers": {"ffn": {"0-1": 0.5}, "qk": {"1": 0.5}, "vo": {"1-2": 0.5}}}
# ZeRO-3's limits by what they make happen on a model of 60 thousand elements.
NOTHING_KEPT = {
    "param_persistence_threshold": 0,
    "max_reuse_distance": 0,
    "max_live_parameters": 0,
    "prefetch_bucket_size": 0,
}
SOME_KEPT = {
    "param_persistence_threshold": 200,
    "max_reuse_distance": 8000,
    "max_live_parameters": 30000,
    "prefetch_bucket_size": 4000,
}


def run_data(
    engine: str,
    *,
    dtype: str = "bfloat16",
    sparse: dict[str, Any] | None = None,
    reentrant: bool | None = None,
    zero: dict[str, int] | None = None,
    fsdp: dict[str, Any] | None = None,
    targets: list[str] | None = None,
    rank: int = 4,
    accumulation: int = 1,
    four_bit: bool = False,
    hpz: int = 1,
    optim: str | None = None,
    name: str = "tiny",
) -> dict[str, Any]:
    """A run file's content; ``reentrant`` None is without checkpointing."""
    section: dict[str, Any] = {"name": engine}
    if engine == "zero3":
        section["deepspeed"] = {"zero_optimization": {"stage": 3} | {f"stage3_{k}": v for k, v in (zero or {}).items()}}
        section["deepspeed"]["zero_optimization"]["zero_hpz_partition_size"] = hpz
    if fsdp:
        section["fsdp"] = fsdp
    data: dict[str, Any] = {
        "model": {"name_or_path": name, "dtype": dtype},
        "data": {"train": "tiny.jsonl", "max_length": 24},
        "train": {
            "output_dir": "runs/tiny",
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": accumulation,
            "optim": optim,
        },
        "lora": {"r": rank, "target_modules": targets or ATTENTION},
        "engine": section,
    }
    if reentrant is not None:
        kwargs = {"use_reentrant": reentrant}
        data["train"] |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    if sparse is not None:
        data["sparse_lora"] = sparse
    if four_bit:
        data["quantization"] = {"load_in_4bit": True}
    return data
