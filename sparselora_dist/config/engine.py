"""The ``engine`` section: what holds the shards, with DeepSpeed's JSON or Accelerate's FSDP names verbatim."""

from __future__ import annotations

import copy
import os
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import MinLen
from pydantic import BeforeValidator, with_config
from typing_extensions import TypedDict

from .errors import ConfigError, require, show
from .files import load_file
from .limits import ALLOWED, Auto, Path, Positive, Says
from .model import CONFIG, Section, own, section

# DeepSpeed's own top-level keys: only to answer one that was put a level too high.
_DEEPSPEED_KEYS = """
    activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comms_logger communication_data_type compile
    compression_training csv_monitor data_efficiency data_types dataloader_drop_last disable_allgather dump_state
    elasticity flops_profiler fp16 gradient_accumulation_steps gradient_clipping gradient_predivide_factor
    hybrid_engine load_universal_checkpoint memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type sparse_attention sparse_gradients steps_per_print tensorboard torch_autocast
    train_batch_size train_micro_batch_size_per_gpu use_node_local_storage wall_clock_breakdown wandb
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
"""

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
_REFUSED_ZERO = {
    "zero_quantized_nontrainable_weights": "frozen weights are stored by 'quantization': set "
    "'quantization.load_in_4bit' true instead",
    "mics_shard_size": "newer DeepSpeed has no MiCS. To gather inside a node only, use 'zero_hpz_partition_size' (ranks "
    "of a node), or engine.name \"fsdp2\" with 'engine.fsdp.dp_shard_size'",
}
_Dtype = Literal["fp32", "float32", "bf16", "bfloat16"]
_Flag = Annotated[bool | Auto, ALLOWED]
_Size = Annotated[Positive | Auto, ALLOWED]
_ClassName = Annotated[str, MinLen(1)]


@with_config(CONFIG)
class MixedPrecision(TypedDict, total=False):
    """The dtypes of an FSDP2 unit."""

    param_dtype: Annotated[_Dtype, ALLOWED]
    """Of the gathered parameters and the compute."""
    reduce_dtype: Annotated[_Dtype, ALLOWED]
    """Of the gradients' reduction."""
    output_dtype: Annotated[_Dtype, ALLOWED]
    """Of what a unit returns."""
    cast_forward_inputs: Annotated[bool, ALLOWED]
    """Cast what a unit receives to ``param_dtype``."""


@with_config(CONFIG)
class FsdpOptions(TypedDict, total=False):
    """Accelerate's names of FSDP2's options; "auto" leaves one to the engine."""

    dp_replicate_size: _Size
    """Replicas of the sharded model."""
    dp_shard_size: _Size
    """Ranks that share one copy of the model, such as the GPUs of a node."""
    fsdp_version: Annotated[Literal[2], ALLOWED]
    """FSDP2 is the one that is offered."""
    fsdp_reshard_after_forward: _Flag
    """Free gathered weights after forward and gather them again in backward."""
    fsdp_cpu_ram_efficient_loading: _Flag
    """Accepted, not needed: each rank reads its own slices anyway."""
    fsdp_offload_params: _Flag
    """Keep shards in the host's memory."""
    fsdp_activation_checkpointing: _Flag
    """As ``train.gradient_checkpointing``."""
    fsdp_state_dict_type: Annotated[Literal["SHARDED_STATE_DICT", "FULL_STATE_DICT", "auto"], ALLOWED]
    """Accepted, not needed: checkpoints load at any number of ranks."""
    fsdp_auto_wrap_policy: Annotated[
        Literal["TRANSFORMER_BASED_WRAP", "auto"],
        ALLOWED,
        Says('"TRANSFORMER_BASED_WRAP" or "auto": every decoder layer is a unit of its own'),
    ]
    """Accepted, not needed: every decoder layer is a unit of its own."""
    fsdp_transformer_layer_cls_to_wrap: Annotated[
        _ClassName | Annotated[list[_ClassName], MinLen(1)],
        ALLOWED,
        Says('a class name, a list of class names, or "auto"'),
    ]
    """Accepted, not needed: the decoder layer is found by itself."""
    fsdp_mixed_precision_policy: _Dtype | Auto | MixedPrecision
    """One dtype for all, or an object."""


def _refuse_fsdp1(value: Any) -> Any:
    for key in value if isinstance(value, dict) else ():
        if key in _FSDP1_KEYS:
            raise ConfigError(f"'{EngineSection.PATH}.fsdp.{key}' ({show(value[key])}) {_FSDP1_KEYS[key]}")
    return value


@section
class EngineSection(Section):
    """One engine, and that engine's own settings under its own name."""

    PATH: ClassVar[str] = "engine"

    name: Literal["single", "zero3", "fsdp2"]
    """``single`` process, DeepSpeed ZeRO-3, or PyTorch FSDP2."""

    deepspeed: dict[str, Any] | Path | None = None
    """For ``zero3``: DeepSpeed's JSON verbatim, or the path of a file with it; "auto" values are filled in later."""

    fsdp: Annotated[FsdpOptions, BeforeValidator(_refuse_fsdp1)] | None = None
    """For ``fsdp2``: Accelerate's names (``fsdp_reshard_after_forward`` and so on); "auto" leaves one to the engine."""

    def __post_init__(self) -> None:
        for key, engine in (("deepspeed", "zero3"), ("fsdp", "fsdp2")):
            if getattr(self, key) is not None and self.name != engine:
                raise ConfigError(
                    f"'{self.PATH}.{key}' is given, but '{self.PATH}.name' is {show(self.name)}: "
                    f"remove '{self.PATH}.{key}', or set '{self.PATH}.name' to \"{engine}\""
                )
        if self.deepspeed is not None:
            _check_deepspeed(self.deepspeed_config(), f"{self.PATH}.deepspeed")

    @classmethod
    def elsewhere(cls, key: str) -> str | None:
        if key in _DEEPSPEED_KEYS.split():
            return f": it is DeepSpeed's: put it under '{cls.PATH}.deepspeed' (as '{cls.PATH}.deepspeed.{key}')"
        if key in FsdpOptions.__annotations__ or key.startswith("fsdp_"):
            return f": put it under '{cls.PATH}.fsdp' (as '{cls.PATH}.fsdp.{key}')"
        return None

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
        shards = shards or world_size // (replicas or 1)
        replicas = replicas or world_size // shards
        if replicas * shards != world_size:
            raise ConfigError(
                f"'{self.PATH}.fsdp': dp_replicate_size {options.get('dp_replicate_size', 'auto')} and dp_shard_size "
                f"{options.get('dp_shard_size', 'auto')} do not make up {world_size} ranks: their product must (to shard "
                "inside a node and replicate over nodes, dp_shard_size is the number of GPUs of a node)"
            )
        return replicas, shards


def _check_deepspeed(config: dict[str, Any], at: str) -> None:
    """Only what this project must know; DeepSpeed itself checks the rest of its JSON."""
    own(config, at)
    if "sparse_lora" in config:
        raise ConfigError(f"'{at}.sparse_lora' is not DeepSpeed's: it is a section of its own, beside 'engine'")
    zero = config.get("zero_optimization", {})
    require(isinstance(zero, dict), f"{at}.zero_optimization", zero, 'an object such as {"stage": 3}')
    for key, why in _REFUSED_ZERO.items():
        if zero.get(key):
            raise ConfigError(f"'{at}.zero_optimization.{key}': {why}")
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
