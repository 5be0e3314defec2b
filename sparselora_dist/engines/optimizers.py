"""Optimizers by the Hugging Face Trainer's names, and what of their state a checkpoint holds.

    adamw_torch, adamw_torch_fused    PyTorch's AdamW, fp32 moments: one state format
    adamw_8bit, paged_adamw_8bit      bitsandbytes' AdamW: a moment is a code of 8 bits and a share of an fp32 scale per 256
                                      values; tensors below 4096 elements keep fp32 moments

Every optimizer can show its moments in fp32, by which a checkpoint loads anywhere. Decoding and coding again does not give
the same codes, so the codes are kept beside them, for the rank that made them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..config.train import TrainSection

# Suffixes of AdamW's state in a checkpoint: ``<parameter>.exp_avg`` and so on.
MOMENTS = ("exp_avg", "exp_avg_sq")
EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")
_BLOCK = 256
_UPDATE = "bitsandbytes::optimizer_update_8bit_blockwise"


def choose_optimizer(train: TrainSection, device: torch.device) -> str:
    """The name of the run's optimizer: ``train.optim``, else fused on a GPU and plain elsewhere.

    Args:
        train: the ``train`` section.
        device: where the values that it steps lie.

    Raises:
        ValueError: it cannot work there.
    """
    name = train.optim
    if name is None:
        return "adamw_torch_fused" if device.type == "cuda" else "adamw_torch"
    if name not in EIGHT_BIT:
        return name
    said = f"'train.optim' is '{name}', but"
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{said} bitsandbytes is not installed: pip install 'sparselora-dist[quantization]', or use 'adamw_torch'"
        )
    if name.startswith("paged_") and device.type != "cuda":
        raise ValueError(
            f"{said} its pages are CUDA's unified memory and what it steps lies on the {device.type.upper()}: use "
            "'adamw_8bit'"
        )
    import bitsandbytes  # noqa: F401  Registers its kernels.

    if not torch._C._dispatch_has_kernel_for_dispatch_key(_UPDATE, device.type.upper()):
        raise ValueError(
            f"{said} bitsandbytes {version('bitsandbytes')} has no 8-bit AdamW for the {device.type.upper()}: "
            "pip install -U bitsandbytes, or use 'adamw_torch'"
        )
    return name


def choose_under_deepspeed(train: TrainSection, ds: dict[str, Any], device: torch.device) -> str:
    """The same where DeepSpeed's JSON (``ds``) has a say; "deepspeed <type>" where it makes the optimizer.

    Raises:
        ValueError: both are given; an 8-bit one whose state DeepSpeed would have to move.
    """
    optim = train.optim
    if "optimizer" in ds:
        kind = ds["optimizer"].get("type")
        if optim is not None:
            raise ValueError(
                f"'train.optim' is '{optim}' and 'engine.deepspeed.optimizer.type' is '{kind}': remove one of the two"
            )
        return f"deepspeed {kind}"
    offload = (ds.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none")
    if optim in EIGHT_BIT and offload != "none":
        raise ValueError(
            f"'train.optim' is '{optim}', but 'engine.deepspeed.zero_optimization.offload_optimizer' moves fp32 moments "
            "only: remove it (8-bit moments are a quarter as large), or remove 'train.optim'"
        )
    return choose_optimizer(train, device if offload == "none" else torch.device("cpu"))


def make_optimizer(name: str, parameters: Iterable[nn.Parameter], train: TrainSection) -> Optimizer:
    """AdamW over ``parameters`` in one group, by the ``train`` section."""
    settings: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
        "weight_decay": train.weight_decay,
    }
    if name in EIGHT_BIT:
        from bitsandbytes import optim

        kind = optim.PagedAdamW8bit if name.startswith("paged_") else optim.AdamW8bit
        return kind(list(parameters), **settings)
    return AdamW(list(parameters), **settings, fused=True if name == "adamw_torch_fused" else None)


# --- the state of one parameter ---------------------------------------------------------------------------------------


def fp32_moments(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """``exp_avg`` and ``exp_avg_sq`` of a parameter's state, shaped as the parameter; decoded where they are codes.

    {} of an empty state.
    """
    if "state1" not in state:
        return {moment: state[moment] for moment in MOMENTS if moment in state}
    return {moment: _decoded(state, number) for number, moment in enumerate(MOMENTS, 1)}


def codes_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What fp32 moments do not give back bit for bit: codes, scales and code tables, on the CPU; {} of an fp32 state."""
    if "state1" not in state or state["state1"].dtype != torch.uint8:
        return {}
    return {key: state[key].cpu().clone() for key in _coded_keys()}


@torch.no_grad()
def restore(
    optimizer: Optimizer, parameter: Tensor, moments: Mapping[str, Tensor], steps: int, saved: Mapping[str, Tensor]
) -> bool:
    """Set the state of one parameter.

    Args:
        optimizer: any of the above, or one of DeepSpeed's own.
        parameter: one that it steps.
        moments: ``exp_avg`` and ``exp_avg_sq``, as the parameter in device, shape and sharding, fp32.
        steps: that it has taken.
        saved: what :func:`codes_of` gave for this very parameter; {} if there is none.

    Returns:
        Whether the state is bit for bit what it was; False where moments had to be coded anew.
    """
    state = optimizer.state[parameter]
    if not hasattr(optimizer, "init_state"):
        fused = isinstance(optimizer, AdamW) and optimizer.defaults["fused"]
        count = torch.tensor(float(steps), device=parameter.device if fused else None)
        # torch counts in a tensor, DeepSpeed's own optimizers in an int.
        state.update(moments, step=count if isinstance(optimizer, AdamW) else steps)
        return True
    if not state:
        _init_8bit(optimizer, parameter)
    state["step"] = steps
    if state["state1"].dtype != torch.uint8:
        for number, moment in enumerate(MOMENTS, 1):
            state[f"state{number}"].copy_(moments[moment])
        return True
    if all(key in saved and saved[key].shape == state[key].shape for key in _coded_keys()):
        for key in _coded_keys():
            # In place: a paged state stays where it is.
            state[key].copy_(saved[key])
        return True
    for number, moment in enumerate(MOMENTS, 1):
        _encode(state, number, moments[moment])
    return False


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _coded_keys() -> list[str]:
    return [f"{part}{number}" for part in ("state", "absmax", "qmap") for number in (1, 2)]


def _decoded(state: Mapping[str, Any], number: int) -> Tensor:
    value: Tensor = state[f"state{number}"]
    if value.dtype != torch.uint8:
        return value
    from bitsandbytes.functional import dequantize_blockwise

    scales: Tensor = state[f"absmax{number}"]
    # Paged codes count as the host's.
    return dequantize_blockwise(value.to(scales.device), absmax=scales, code=state[f"qmap{number}"], blocksize=_BLOCK)


def _encode(state: dict[str, Any], number: int, value: Tensor) -> None:
    from bitsandbytes.functional import quantize_blockwise

    coded, made = quantize_blockwise(value.contiguous(), code=state[f"qmap{number}"], blocksize=_BLOCK)
    state[f"state{number}"].copy_(coded)
    state[f"absmax{number}"].copy_(made.absmax)


def _init_8bit(optimizer: Any, parameter: Tensor) -> None:
    """bitsandbytes' own empty state; ZeRO-3 puts a parameter into its group for the step alone."""
    group = optimizer.param_groups[0]
    kept, group["params"] = group["params"], [parameter]
    try:
        optimizer.init_state(group, parameter, 0, 0)
    finally:
        group["params"] = kept
