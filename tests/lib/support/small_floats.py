"""Checkpoints in fp8, nvfp4 and mxfp4, written tensor by tensor as the libraries write them; and an independent decoding."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparselora_dist.config import ModelSection, QuantizationSection
from sparselora_dist.io.load import LoadedBase, load_base
from sparselora_dist.sharding.placement import Placement

from .merging import save_base
from .models import ALL_LINEAR

FILE = "model.safetensors"
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
}
E2M1 = torch.tensor([sign * value for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])


@dataclass(frozen=True)
class Kind:
    """How a checkpoint of tests is stored."""

    format: str
    grain: tuple[int, int]
    """Rows and columns that share a scale; 0 is all."""
    settings: dict[str, Any]
    """Its ``quantization_config``."""
    packed: str = ""
    scales: str = "_scale"
    dtype: torch.dtype = torch.float32
    """Of scales; uint8 and float8_e8m0fnu are powers of two."""
    shape: str = "matrix"
    """Of scales: ``matrix``, ``flat``, ``scalar`` or ``blocks``, which is (n, 1, m, 1)."""
    whole: str = ""
    over: bool = False
    besides: dict[str, Tensor] = field(default_factory=dict)
    """Other tensors of each module."""


def _compressed(form: str, weights: dict[str, Any], ignore: tuple[str, ...] = ("lm_head",)) -> dict[str, Any]:
    weights = {"symmetric": True, "dynamic": False, "type": "float", "actorder": None} | weights
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {"group_0": group},
        "kv_cache_scheme": None,
    }


def _modelopt(algorithm: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]} | more


_INPUT = {"input_scale": torch.tensor(0.25), "k_scale": torch.tensor(1.0)}
_FP4 = {"num_bits": 4}
KINDS = {
    "fp8 tensor": Kind(
        "fp8",
        (0, 0),
        _compressed("float-quantized", {"num_bits": 8, "strategy": "tensor"}),
        shape="flat",
        besides=_INPUT,
    ),
    "fp8 channel": Kind(
        "fp8", (1, 0), _compressed("float-quantized", {"num_bits": 8, "strategy": "channel"}), dtype=torch.bfloat16
    ),
    "fp8 group": Kind(
        "fp8", (1, 32), _compressed("float-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32})
    ),
    "fp8 block": Kind(
        "fp8",
        (24, 40),
        _compressed("float-quantized", {"num_bits": 8, "strategy": "block", "block_structure": [24, 40]}),
    ),
    "mxfp8": Kind(
        "fp8",
        (1, 32),
        _compressed("mxfp8-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}),
        dtype=torch.uint8,
    ),
    "nvfp4": Kind(
        "nvfp4",
        (1, 16),
        _compressed("nvfp4-pack-quantized", _FP4 | {"strategy": "tensor_group", "group_size": 16}),
        packed="_packed",
        dtype=torch.float8_e4m3fn,
        whole="_global_scale",
        over=True,
        besides={"input_global_scale": torch.tensor([3.0])},
    ),
    "mxfp4": Kind(
        "mxfp4",
        (1, 32),
        _compressed("mxfp4-pack-quantized", _FP4 | {"strategy": "group", "group_size": 32}),
        packed="_packed",
        dtype=torch.uint8,
    ),
    "modelopt fp8": Kind("fp8", (0, 0), _modelopt("FP8", kv_cache_quant_algo="FP8"), shape="scalar", besides=_INPUT),
    "modelopt fp8 channel": Kind("fp8", (1, 0), _modelopt("FP8_PER_CHANNEL_PER_TOKEN"), shape="flat"),
    "modelopt fp8 block": Kind("fp8", (128, 128), _modelopt("FP8_PB_WO"), shape="blocks"),
    "modelopt nvfp4": Kind(
        "nvfp4",
        (1, 16),
        _modelopt("NVFP4", group_size=16),
        dtype=torch.float8_e4m3fn,
        whole="_scale_2",
        besides=_INPUT,
    ),
    "fine-grained": Kind(
        "fp8", (32, 24), {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 24]}, scales="_scale_inv"
    ),
    "fine-grained powers": Kind(
        "fp8",
        (32, 32),
        {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
        scales="_scale_inv",
        dtype=torch.float8_e8m0fnu,
    ),
    "autofp8": Kind(
        "fp8", (0, 0), {"quant_method": "fp8", "activation_scheme": "static"}, shape="scalar", besides=_INPUT
    ),
    "fbgemm": Kind("fp8", (1, 0), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
}


def write_checkpoint(folder: Path, kind: str, left: tuple[str, ...] = (), **shape: Any) -> dict[str, Tensor]:
    """A tiny Llama whose matrices in decoder layers are stored so.

    Args:
        left: modules that stay as they are, by what their names hold.
        shape: of the model, for :data:`SHAPE`.

    Returns:
        What the matrices mean, fp32, by key; also those that stay.
    """
    save_base(folder, **shape or SHAPE)
    return encode_files(folder, kind, left)


def encode_files(folder: Path, kind: str, left: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The same of a model that is there; its experts' matrices, one by one in the files, too."""
    own = KINDS[kind]
    tensors, means = load_file(folder / FILE), {}
    for key in [key for key in tensors if key.split(".")[-2] in ALL_LINEAR]:
        means[key] = tensors[key]
        if not any(name in key for name in left):
            held = encoded(own, key, tensors.pop(key))
            means[key] = meant(own, key, held)
            tensors |= held
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / FILE, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": own.settings}))
    return means


def encoded(kind: Kind, key: str, matrix: Tensor) -> dict[str, Tensor]:
    """The tensors of a matrix (out, in); nearest codes, but nothing depends on how good they are."""
    down, across = (step or size for step, size in zip(kind.grain, matrix.shape))
    rows, columns = -(-matrix.shape[0] // down), -(-matrix.shape[1] // across)
    padded = torch.zeros(rows * down, columns * across)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix.abs()
    largest = padded.view(rows, down, columns, across).amax((1, 3)).clamp(min=1e-4)
    most = 448.0 if kind.format == "fp8" else 6.0
    scales, held = largest / most, {}
    if kind.whole:
        whole = (448.0 / scales.max() if kind.over else scales.max() / 448.0).view(1 if kind.over else ())
        held[key + kind.whole] = whole
        scales = (scales * whole if kind.over else scales / whole).to(torch.float8_e4m3fn)
        factors = scales.float() / whole if kind.over else scales.float() * whole
    elif kind.dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponents = scales.log2().ceil()
        scales, factors = (exponents + 127).to(torch.uint8).view(kind.dtype), exponents.exp2()
    else:
        scales = scales.to(kind.dtype)
        factors = scales.float()
    quotients = matrix / expanded(factors, (down, across), matrix.shape)
    if kind.format == "fp8":
        held[key] = quotients.clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        codes = (quotients.unsqueeze(-1) - E2M1).abs().argmin(-1).to(torch.uint8)
        held[key + kind.packed] = codes[:, ::2] | codes[:, 1::2] << 4
    shapes = {"matrix": (rows, columns), "flat": (rows * columns,), "scalar": (), "blocks": (rows, 1, columns, 1)}
    held[key + kind.scales] = scales.view(shapes[kind.shape])
    module = key.removesuffix("weight")
    return held | {module + name: t.clone() for name, t in kind.besides.items()}


def meant(kind: Kind, key: str, held: dict[str, Tensor]) -> Tensor:
    """The matrix (out, in) that the tensors mean, by the libraries' formulas: fp32, a product rounded once."""
    codes = held[key + kind.packed].view(torch.uint8)
    if kind.format == "fp8":
        values = torch.tensor([e4m3(code) for code in range(256)])[codes.int()]
    else:
        pairs = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
        values = E2M1[pairs.int()]
    scales = held[key + kind.scales]
    if kind.dtype in (torch.uint8, torch.float8_e8m0fnu):
        factors = torch.tensor([2.0 ** (byte - 127) for byte in range(255)])[scales.view(torch.uint8).int()]
    elif kind.dtype is torch.float8_e4m3fn:
        factors = torch.tensor([e4m3(code) for code in range(256)])[scales.view(torch.uint8).int()]
        whole = held[key + kind.whole]
        factors = factors / whole if kind.over else factors * whole
    else:
        factors = scales.float()
    steps = tuple(step or size for step, size in zip(kind.grain, values.shape))
    factors = factors.view(*(-(-size // step) for step, size in zip(steps, values.shape)))
    return values * expanded(factors, steps, values.shape)


def expanded(scales: Tensor, steps: tuple[int, ...], shape: torch.Size) -> Tensor:
    """A scale for every value."""
    wide = scales.repeat_interleave(steps[0], 0).repeat_interleave(steps[1], 1)
    return wide[: shape[0], : shape[1]]


def e4m3(code: int) -> float:
    """A sign, four bits of exponent with bias 7, three of mantissa; no infinities."""
    sign, exponent, mantissa = (-1.0 if code & 128 else 1.0), code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * ((1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6)


@cache
def written(kind: str) -> tuple[Path, dict[str, Tensor]]:
    """A folder with such a checkpoint, which nobody changes, and what its matrices mean."""
    folder = Path(tempfile.mkdtemp())
    return folder, write_checkpoint(folder, kind)


def copied(folder: Path, to: Path) -> None:
    """A checkpoint that may be damaged."""
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a folder's ``quantization_config``; without a result it is dropped."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = change(config.get("quantization_config", {}))
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def stream(folder: Path, format: Any = None) -> LoadedBase:
    section = ModelSection(name_or_path=str(folder), dtype="float32")
    return load_base(section, QuantizationSection(format=format), Placement(torch.device("cpu")))
