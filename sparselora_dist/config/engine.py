"""The ``engine`` section: what holds the shards, with DeepSpeed's JSON or Accelerate's FSDP names verbatim."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .files import load_file
from .parse import ConfigError, check_fields, dump_dataclass, parse_dataclass, refuse_code, require, show, unknown_key

__all__ = ["EngineSection"]

# DeepSpeed's own top-level keys: only to answer one that was put a level too high.
# fmt: off
_DEEPSPEED_KEYS = frozenset((
    "activation_checkpointing", "aio", "amp", "autotuning", "bf16", "bfloat16", "checkpoint", "comms_logger",
    "communication_data_type", "compile", "compression_training", "csv_monitor", "data_efficiency", "data_types",
    "dataloader_drop_last", "disable_allgather", "dump_state", "elasticity", "flops_profiler", "fp16",
    "gradient_accumulation_steps", "gradient_clipping", "gradient_predivide_factor", "hybrid_engine",
    "load_universal_checkpoint", "memory_breakdown", "optimizer", "pipeline", "prescale_gradients", "scheduler",
    "seq_parallel_communication_data_type", "sparse_attention", "sparse_gradients", "steps_per_print", "tensorboard",
    "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu", "use_node_local_storage",
    "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "zero_optimization",
))
# fmt: on

_OLD = "belongs to FSDP1, which is not offered"
# Accelerate's names that FSDP2 no longer has, with what stands in their place.
_FSDP1_KEYS = {
    "fsdp_sharding_strategy": f'{_OLD}: use "fsdp_reshard_after_forward" true (FULL_SHARD) or false (SHARD_GRAD_OP)',
    "fsdp_backward_prefetch": f"{_OLD}: FSDP2 prefetches by itself; remove it",
    "fsdp_forward_prefetch": f"{_OLD}: FSDP2 prefetches by itself; remove it",
    "fsdp_sync_module_states": f"{_OLD}: every rank loads the same weights; remove it",
    "fsdp_use_orig_params": f"{_OLD}: FSDP2 always keeps the original parameters; remove it",
    "fsdp_min_num_params": f"{_OLD}: every decoder layer is a unit of its own here; remove it",
}
_DTYPES = ("fp32", "float32", "bf16", "bfloat16")
_POLICY_KEYS = ("param_dtype", "reduce_dtype", "output_dtype", "cast_forward_inputs")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_names(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) and item for item in items)


def _is_policy(value: Any) -> bool:
    if not isinstance(value, dict):
        return value in _DTYPES
    return all(
        isinstance(item, bool) if key == "cast_forward_inputs" else item in _DTYPES for key, item in value.items()
    )


_BOOL: tuple[Callable[[Any], bool], str] = (_is_bool, 'true, false or "auto"')
_SIZE: tuple[Callable[[Any], bool], str] = (_is_size, 'integers from 1, or "auto"')
_FSDP_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "dp_replicate_size": _SIZE,
    "dp_shard_size": _SIZE,
    "fsdp_version": (lambda value: value == 2 and not isinstance(value, bool), "2"),
    "fsdp_reshard_after_forward": _BOOL,
    "fsdp_cpu_ram_efficient_loading": _BOOL,
    "fsdp_offload_params": _BOOL,
    "fsdp_activation_checkpointing": _BOOL,
    "fsdp_state_dict_type": (
        lambda value: value in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"),
        '"SHARDED_STATE_DICT", "FULL_STATE_DICT" or "auto"',
    ),
    "fsdp_auto_wrap_policy": (
        lambda value: value == "TRANSFORMER_BASED_WRAP",
        '"TRANSFORMER_BASED_WRAP" or "auto": every decoder layer is a unit of its own',
    ),
    "fsdp_transformer_layer_cls_to_wrap": (_is_names, 'a class name, a list of class names, or "auto"'),
    "fsdp_mixed_precision_policy": (
        _is_policy,
        f'one of {", ".join(_DTYPES)}, "auto", or an object with {", ".join(_POLICY_KEYS[:3])} (one of these each) and '
        f"{_POLICY_KEYS[3]} (true or false)",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSection:
    """One engine, and that engine's own settings under its own name."""

    PATH: ClassVar[str] = "engine"

    name: Literal["single", "zero3", "fsdp2"]
    """``single`` process, DeepSpeed ZeRO-3, or PyTorch FSDP2."""

    deepspeed: dict[str, Any] | str | None = None
    """For ``zero3``: DeepSpeed's JSON verbatim, or the path of a file with it; "auto" values are filled in later."""

    fsdp: dict[str, Any] | None = None
    """For ``fsdp2``: Accelerate's names (``fsdp_reshard_after_forward`` and so on); "auto" leaves one to the engine."""

    def __post_init__(self) -> None:
        check_fields(self, self.PATH)
        for key, engine in (("deepspeed", "zero3"), ("fsdp", "fsdp2")):
            if getattr(self, key) is not None and self.name != engine:
                raise ConfigError(
                    f"'{self.PATH}.{key}' is given, but '{self.PATH}.name' is {show(self.name)}: "
                    f"remove '{self.PATH}.{key}', or set '{self.PATH}.name' to \"{engine}\""
                )
        if self.deepspeed is not None:
            _check_deepspeed(self.deepspeed_config(), f"{self.PATH}.deepspeed")
        if self.fsdp is not None:
            _check_fsdp(self.fsdp, f"{self.PATH}.fsdp")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EngineSection:
        """From the keys above; DeepSpeed's and FSDP's own keys are refused here and pointed to their block."""
        refuse_code(data, cls.PATH)
        for key in data if isinstance(data, dict) else ():
            if key in _DEEPSPEED_KEYS:
                raise ConfigError(
                    f"unknown key '{cls.PATH}.{key}': it is DeepSpeed's: put it under '{cls.PATH}.deepspeed' "
                    f"(as '{cls.PATH}.deepspeed.{key}')"
                )
            if str(key).startswith("fsdp_"):
                raise ConfigError(
                    f"unknown key '{cls.PATH}.{key}': put it under '{cls.PATH}.fsdp' (as '{cls.PATH}.fsdp.{key}')"
                )
        return parse_dataclass(cls, data, cls.PATH)

    def to_dict(self) -> dict[str, Any]:
        return dump_dataclass(self)

    def deepspeed_config(self) -> dict[str, Any]:
        """DeepSpeed's JSON as a dict of the caller's own, read from its file where a path was given; {} without one."""
        if self.deepspeed is None:
            return {}
        if isinstance(self.deepspeed, dict):
            return copy.deepcopy(self.deepspeed)
        if not os.path.isfile(self.deepspeed):
            raise ConfigError(
                f"'{self.PATH}.deepspeed' is {show(self.deepspeed)}: no such file (seen from {show(os.getcwd())}): "
                f"give the path of a DeepSpeed JSON file, or the object itself"
            )
        return load_file(self.deepspeed)

    def fsdp_options(self) -> dict[str, Any]:
        """The FSDP settings that are set: ``fsdp`` without its "auto" values."""
        return {key: copy.deepcopy(value) for key, value in (self.fsdp or {}).items() if value != "auto"}

    def fsdp_mesh(self, world_size: int) -> tuple[int, int]:
        """(replicas, shards) of ``dp_replicate_size`` and ``dp_shard_size``; one gives the other, none shards over all.

        Raises:
            ConfigError: they do not make up ``world_size`` ranks.
        """
        options = self.fsdp_options()
        replicas, shards = options.get("dp_replicate_size"), options.get("dp_shard_size")
        if shards is None:
            shards = world_size // (replicas or 1)
        if replicas is None:
            replicas = world_size // shards
        if replicas * shards != world_size:
            raise ConfigError(
                f"'{self.PATH}.fsdp': dp_replicate_size {options.get('dp_replicate_size', 'auto')} and dp_shard_size "
                f"{options.get('dp_shard_size', 'auto')} do not make up {world_size} ranks: their product must (to shard "
                "inside a node and replicate over nodes, dp_shard_size is the number of GPUs of a node)"
            )
        return replicas, shards


def _check_deepspeed(config: dict[str, Any], at: str) -> None:
    """Only what this project must know; DeepSpeed itself checks the rest of its JSON."""
    refuse_code(config, at)
    if "sparse_lora" in config:
        raise ConfigError(f"'{at}.sparse_lora' is not DeepSpeed's: it is a section of its own, beside 'engine'")
    zero = config.get("zero_optimization", {})
    require(isinstance(zero, dict), f"{at}.zero_optimization", zero, 'an object such as {"stage": 3}')
    if zero.get("zero_quantized_nontrainable_weights"):
        raise ConfigError(
            f"'{at}.zero_optimization.zero_quantized_nontrainable_weights': frozen weights are stored by 'quantization': "
            "set 'quantization.load_in_4bit' true instead"
        )
    if zero.get("mics_shard_size"):
        raise ConfigError(
            f"'{at}.zero_optimization.mics_shard_size': newer DeepSpeed has no MiCS. To gather inside a node only, use "
            "'zero_hpz_partition_size' (ranks of a node), or engine.name \"fsdp2\" with 'engine.fsdp.dp_shard_size'"
        )
    stage = zero.get("stage", 3)
    require(
        stage == 3 and not isinstance(stage, bool), f"{at}.zero_optimization.stage", stage, "3 (the engine is ZeRO-3)"
    )
    offload = zero.get("offload_param")
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        raise ConfigError(
            f"'{at}.zero_optimization.offload_param.device' is \"nvme\": frozen weights are streamed from their files to a "
            'GPU or to the host\'s memory; use "cpu" or "none"'
        )


def _check_fsdp(config: dict[str, Any], at: str) -> None:
    for key, value in config.items():
        if key in _FSDP1_KEYS:
            raise ConfigError(f"'{at}.{key}' ({show(value)}) {_FSDP1_KEYS[key]}")
        if key not in _FSDP_KEYS:
            raise unknown_key(at, key, _FSDP_KEYS)
        fits, allowed = _FSDP_KEYS[key]
        if key == "fsdp_mixed_precision_policy" and isinstance(value, dict):
            for name in value:
                if name not in _POLICY_KEYS:
                    raise unknown_key(f"{at}.{key}", name, _POLICY_KEYS)
        require((value == "auto" and key != "fsdp_version") or fits(value), f"{at}.{key}", value, allowed)
