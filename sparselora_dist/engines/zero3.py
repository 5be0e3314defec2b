"""DeepSpeed ZeRO-3: the only file that knows DeepSpeed."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config.run import RunConfig
from ..io.pretrained import read_config
from ..sharding.placement import Placement
from ..sharding.units import gathered_together
from .base import Engine
from .build_lock import wait_for_builds
from .hosts import check_groups
from .optimizers import (
    EIGHT_BIT,
    MOMENTS,
    choose_under_deepspeed,
    codes_of,
    fp32_moments,
    make_optimizer,
    restore,
    under,
)
from .ranks import Ranks, start_distributed

AUTO = "auto"


def resolve_auto(
    ds: dict[str, Any], config: RunConfig, world_size: int, hidden_size: int, steps: int
) -> dict[str, Any]:
    """DeepSpeed's JSON with its ``"auto"`` values filled in, by the same rules as Transformers' integration.

    Raises:
        ValueError: an ``"auto"`` at a key that has no rule, named; a batch setting that contradicts ``train``.
    """
    train = config.train
    warmup = train.warmup_steps or math.ceil(train.warmup_ratio * steps)
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.per_device_train_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "train_batch_size": train.per_device_train_batch_size * train.gradient_accumulation_steps * world_size,
        "gradient_clipping": train.max_grad_norm,
        "bf16.enabled": config.model.dtype == "bfloat16",
        "fp16.enabled": False,
        "optimizer.params.lr": train.learning_rate,
        "optimizer.params.betas": [train.adam_beta1, train.adam_beta2],
        "optimizer.params.eps": train.adam_epsilon,
        "optimizer.params.weight_decay": train.weight_decay,
        "scheduler.params.warmup_min_lr": 0,
        "scheduler.params.warmup_max_lr": train.learning_rate,
        "scheduler.params.warmup_num_steps": warmup,
        "scheduler.params.total_num_steps": steps,
        "zero_optimization.reduce_bucket_size": hidden_size * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
    }

    def fill(node: Any, path: str) -> Any:
        if isinstance(node, dict):
            return {key: fill(value, f"{path}.{key}" if path else key) for key, value in node.items()}
        if node != AUTO:
            return node
        if path not in values:
            raise ValueError(
                f"'engine.deepspeed.{path}' is \"auto\", which has no rule: give a value. Keys with a rule: "
                f"{', '.join(sorted(values))}"
            )
        return values[path]

    filled = fill(ds, "")
    rate = filled.get("optimizer", {}).get("params", {}).get("lr", train.learning_rate)
    if rate != train.learning_rate:
        raise ValueError(
            f"'engine.deepspeed.optimizer.params.lr' is {rate}, but 'train.learning_rate' is {train.learning_rate}: use "
            '"auto"'
        )
    for key in (
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "train_batch_size",
        "gradient_clipping",
    ):
        if key in filled and filled[key] != values[key]:
            raise ValueError(
                f"'engine.deepspeed.{key}' is {filled[key]}, but the train section and {world_size} ranks make it "
                f'{values[key]}: use "auto"'
            )
        filled[key] = values[key]
    zero = filled.setdefault("zero_optimization", {})
    zero.setdefault("stage", 3)
    if config.model.dtype == "bfloat16":
        filled.setdefault("bf16", {"enabled": True})
    enabled = bool(filled.get("bf16", {}).get("enabled"))
    if enabled != (config.model.dtype == "bfloat16") or filled.get("fp16", {}).get("enabled"):
        raise ValueError(
            f"'engine.deepspeed' asks for another precision than model.dtype {config.model.dtype!r}: set bf16.enabled "
            'to "auto" and remove fp16'
        )
    filled.setdefault("steps_per_print", 10**9)
    return filled


class FlatShards(Placement):
    """ZeRO-3: every parameter flat, in equal pieces padded at the end; made a DeepSpeed parameter at once.

    Args:
        init: DeepSpeed's ``zero.Init``, which knows the group and where partitions live.
    """

    def __init__(self, init: Any) -> None:
        home = torch.device(getattr(init.remote_device, "value", init.remote_device))  # DeepSpeed's enum, or a device.
        super().__init__(init.local_device, init.rank, init.dp_world_size, init.ds_process_group, home)
        self._init = init

    def rows(self, total: int, widths: Sequence[int], rank: int | None = None) -> tuple[int, int]:
        rank = self.rank if rank is None else rank
        starts, stops = [], []
        for width in widths:
            piece = -(-total * width // self.size)
            starts.append(min(rank * piece // width, total))
            stops.append(min(-(-(rank + 1) * piece // width), total))
        return min(starts), max(stops)

    @torch.no_grad()
    def parameter(self, rows: Tensor, start: int, shape: torch.Size) -> nn.Parameter:
        from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus

        # One element stands for the whole tensor while DeepSpeed takes down its shape.
        parameter: Any = nn.Parameter(rows.new_empty(1).expand(shape), requires_grad=False)
        self._init._convert_to_deepspeed_param(parameter)
        piece = self._init._aligned_size(parameter) // self.size
        begin = self.rank * piece - start * shape[1:].numel()
        own = rows.reshape(-1)[begin : begin + piece]
        home = self.device if parameter.ds_persist else self.home
        pinned = self._init.pin_memory and home.type == "cpu" and torch.cuda.is_available()
        if own.numel() == piece and own.nbytes == own.untyped_storage().nbytes() and own.device == home and not pinned:
            partition = own
        else:
            partition = torch.zeros(piece, dtype=rows.dtype, device=home, pin_memory=pinned)
            partition[: own.numel()] = own
        parameter.ds_tensor = partition
        parameter.ds_tensor.ds_numel = piece
        parameter.ds_tensor.status = PartitionedParamStatus.AVAILABLE
        parameter.ds_tensor.final_location = None
        parameter.ds_numel_aligned = piece * self.size
        parameter.data = rows.new_empty(0)
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
        return parameter


class Zero3Engine(Engine):
    """``deepspeed.initialize`` at stage 3. What reads its children's weights itself (a sparse FFN) is gathered as one."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            # DeepSpeed builds an operator with the ninja that it finds on PATH: the one installed beside the interpreter.
            os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        # Two of DeepSpeed's collectives go by names that torch renamed; one line per rank and step would bury the bar.
        warnings.filterwarnings("ignore", ".*(all_gather_into_tensor|reduce_scatter_tensor).*deprecated", FutureWarning)
        super().__init__(config, ranks)
        self.ranks, self.heartbeat = start_distributed(ranks, config.train.ddp_timeout, config.train.heartbeat_timeout)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        import deepspeed

        self._deepspeed = deepspeed
        wait_for_builds(shared=ranks.local_world_size < ranks.world_size)
        deepspeed.init_distributed()
        self._json = config.engine.deepspeed_config()
        node = self._json.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
        if isinstance(node, int):
            check_groups(self.ranks.hosts, node, "engine.deepspeed.zero_optimization.zero_hpz_partition_size")
        self.optim = choose_under_deepspeed(config.train, self._json, self.device)

    def _resolved(self, hidden_size: int) -> dict[str, Any]:
        return resolve_auto(self._json, self.config, self.ranks.world_size, hidden_size, self.total_steps)

    def placement(self) -> Placement:
        base = read_config(self.config.model.name_or_path)
        ds = self._resolved(base.hidden_size)
        group = None
        if ds["zero_optimization"].get("zero_hpz_partition_size", 1) > 1:
            # DeepSpeed makes the node's group once in a process and refuses to make it again.
            group = self._deepspeed.utils.groups._get_zero_param_intra_parallel_group()
        return FlatShards(self._deepspeed.zero.Init(config_dict_or_path=ds, zero_param_parallel_group=group))

    def prepare(self, model: nn.Module) -> None:
        for module in gathered_together(model):
            self._deepspeed.utils.set_z3_leaf_module(module, True)
        ds = self._resolved(model.config.hidden_size)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = None
        if "optimizer" not in ds:
            optimizer = make_optimizer(self.optim, parameters, self.config.train)
        if self.optim in EIGHT_BIT:
            # It steps DeepSpeed's flat fp32 partitions, one tensor a rank: nothing that it could mistake.
            ds["zero_allow_untested_optimizer"] = True
        self.model, _, _, self.scheduler = self._deepspeed.initialize(
            model=model, model_parameters=parameters, optimizer=optimizer, config=ds
        )
        self.optimizer: Optimizer = self.model.optimizer.optimizer

    @property
    def module(self) -> nn.Module:
        return self.model.module

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # Packed steps have as many micro-batches as they need, whatever DeepSpeed's JSON counts.
        self.model.set_gradient_accumulation_boundary(last)
        # The loss is already a share of the global batch's: DeepSpeed must not divide it again.
        self.model.backward(loss, scale_wrt_gas=False)

    def local_gradients(self) -> dict[str, Tensor]:
        get = self._deepspeed.utils.safe_get_local_grad
        return {name: get(p) for name, p in self.trainable().items()}

    def full_gradients(self) -> dict[str, Tensor]:
        get = self._deepspeed.utils.safe_get_full_grad
        return {name: get(p).float().cpu().clone() for name, p in self.trainable().items()}

    def clear_gradients(self) -> None:
        self.model.optimizer.zero_grad()  # The next backward writes over what is there.

    def step(self) -> float:
        self.model.step()
        return float(self.model.get_global_grad_norm() or 0.0)

    # --- state ----------------------------------------------------------------------------------------------------

    def full_parameters(self) -> dict[str, Tensor]:
        get = self._deepspeed.utils.safe_get_full_fp32_param
        return {name: get(p).float().cpu().clone() for name, p in self.trainable().items()}

    def full_moments(self) -> tuple[dict[str, Tensor], int]:
        get = self._deepspeed.utils.safe_get_full_optimizer_state
        states = list(self.optimizer.state.values())
        if not states:
            return {}, 0
        with self._moments_in_fp32():
            moments = {
                f"{name}.{moment}": get(p, moment).float().cpu().clone()
                for name, p in self.trainable().items()
                for moment in MOMENTS
            }
        return moments, int(states[0].get("step", 0))

    @contextlib.contextmanager
    def _moments_in_fp32(self) -> Iterator[None]:
        """DeepSpeed finds moments by their names: those of 8-bit states stand there for a while."""
        shown = [state for state in self.optimizer.state.values() if "state1" in state]
        for state in shown:
            state.update(fp32_moments(state))
        try:
            yield
        finally:
            for state in shown:
                for moment in MOMENTS:
                    del state[moment]

    def own_codes(self) -> dict[str, Tensor]:
        # The blocks of a scale run over the parameters of a flat partition.
        states = [self.optimizer.state.get(flat, {}) for flat in self.model.optimizer.fp32_partitioned_groups_flat]
        return {f"flat.{i}.{key}": t for i, state in enumerate(states) for key, t in codes_of(state).items()}

    @torch.no_grad()
    def load_state(
        self,
        parameters: dict[str, Tensor],
        moments: dict[str, Tensor],
        steps: int,
        codes: dict[str, Tensor] | None = None,
    ) -> bool:
        utils = self._deepspeed.utils
        flats = self.model.optimizer.fp32_partitioned_groups_flat if moments else []
        for flat in flats:
            self.optimizer.state[flat].update({moment: torch.zeros_like(flat) for moment in MOMENTS})
        for name, p in self.trainable().items():
            with self._deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                p.copy_(parameters[name].to(p.device, p.dtype))
            utils.safe_set_local_fp32_param(p, self._slice(parameters[name], p))
            for moment in MOMENTS if moments else ():
                utils.safe_set_local_optimizer_state(p, self._slice(moments[f"{name}.{moment}"], p), moment)
        exact = True
        for i, flat in enumerate(flats):
            state = self.optimizer.state[flat]
            whole = {moment: state.pop(moment) for moment in MOMENTS}
            exact &= restore(self.optimizer, flat, whole, steps, under(f"flat.{i}.", codes or {}))
        return exact

    def _slice(self, value: Tensor, parameter: Any) -> Tensor:
        """This rank's flat partition of a whole tensor, padded as DeepSpeed pads."""
        size = parameter.ds_tensor.ds_numel
        padded = torch.zeros(size * self.ranks.world_size, device=parameter.ds_tensor.device)
        padded[: value.numel()] = value.flatten()
        return padded[size * self.ranks.rank :][:size]
