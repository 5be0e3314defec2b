"""What is refused of checkpoints in fp8, nvfp4 and mxfp4, by key, value, tensor and shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparselora_dist.io.manifest import CorruptFileError
from sparselora_dist.io.prequantized import PrequantizedError
from support.small_floats import FILE, KINDS, copied, edit, stream, written

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("kind", ["fp8 channel", "nvfp4", "mxfp4", "modelopt nvfp4", "fine-grained"])
@pytest.mark.parametrize("asked", [None, "nf4", "another"])
def test_a_run_that_asks_for_something_else(kind: str, asked: str | None) -> None:
    folder, _ = written(kind)
    form = KINDS[kind].format
    asked = asked if asked != "another" else "fp8" if form != "fp8" else "nvfp4"
    with pytest.raises(PrequantizedError, match=f'is {form}: set quantization.format "{form}"'):
        stream(folder, asked)


def weights_with(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(settings: dict[str, Any]) -> dict[str, Any]:
        group = settings["config_groups"]["group_0"]
        return settings | {"config_groups": {"group_0": group | {"weights": group["weights"] | values}}}

    return change


def top_with(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda settings: settings | values


def two_groups(settings: dict[str, Any]) -> dict[str, Any]:
    first = settings["config_groups"]["group_0"] | {"format": "float-quantized"}
    second = KINDS["nvfp4"].settings["config_groups"]["group_0"] | {"format": "nvfp4-pack-quantized"}
    return settings | {"format": "mixed-precision", "config_groups": {"group_0": first, "group_1": second}}


MIXED = {
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4"}},
}


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("fp8 tensor", top_with(format="pack-quantized"), "format 'pack-quantized'"),
        ("fp8 tensor", top_with(format="int-quantized"), "format 'int-quantized'"),
        (
            "fp8 tensor",
            top_with(sparsity_config={"format": "sparse-24-bitmask"}),
            "sparsity_config.format 'sparse-24-bitm",
        ),
        ("fp8 tensor", weights_with(type="int"), "config_groups.group_0.weights.type 'int'"),
        ("fp8 tensor", weights_with(num_bits=4), "config_groups.group_0.weights.num_bits 4"),
        ("fp8 tensor", weights_with(symmetric=False), "weights.symmetric False"),
        ("fp8 tensor", weights_with(actorder="group"), "weights.actorder 'group'"),
        ("fp8 tensor", weights_with(strategy="attn_head"), "weights.strategy 'attn_head'"),
        ("fp8 tensor", two_groups, "config_groups in fp8 and nvfp4"),
        ("fp8 tensor", top_with(config_groups={"FP8": ["Linear"]}), r"config_groups.FP8 \['Linear'\]"),
        ("nvfp4", weights_with(group_size=32), "weights.group_size 32"),
        ("mxfp4", weights_with(group_size=16), "weights.group_size 16"),
        ("modelopt nvfp4", top_with(quant_algo="NVFP4_AWQ"), "quant_algo 'NVFP4_AWQ'"),
        ("modelopt nvfp4", top_with(group_size=32), "group_size 32"),
        ("modelopt nvfp4", top_with(**MIXED), "layers in fp8 and nvfp4"),
        ("fine-grained", top_with(fmt="e5m2"), "fmt 'e5m2'"),
        ("fine-grained", top_with(weight_block_size=[0, 128]), r"weight_block_size \[0, 128\]"),
        ("fine-grained", top_with(quant_method="quark"), "quantised by 'quark'"),
    ],
)
def test_settings_that_are_not_read(tmp_path: Path, kind: str, change: Any, says: str) -> None:
    folder, _ = written(kind)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    edit(tmp_path, change)  # There are no weights: it is seen before anything is looked for.
    with pytest.raises(PrequantizedError, match=says) as caught:
        stream(tmp_path, KINDS[kind].format)
    assert "bf16 checkpoint" in str(caught.value) and str(tmp_path) in str(caught.value)


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, change(tensors[name]).clone())


def with_nan(codes: Tensor) -> Tensor:
    """The last value of a tensor becomes NaN: all bits set, in every kind of number here."""
    data = codes.clone()
    data.view(torch.uint8).view(-1)[-data.itemsize :] = 255
    return data


@pytest.mark.parametrize(
    ("kind", "change", "error", "says"),
    [
        ("fp8 channel", without(f"{UP}_scale"), CorruptFileError, f"no '{UP}_scale'"),
        ("nvfp4", without(f"{UP}_global_scale"), CorruptFileError, f"no '{UP}_global_scale'"),
        ("modelopt nvfp4", without(f"{UP}_scale_2"), CorruptFileError, f"no '{UP}_scale_2'"),
        ("fine-grained", without(f"{UP}_scale_inv"), CorruptFileError, f"no '{UP}_scale_inv'"),
        ("fp8 channel", replaced(f"{UP}_scale", lambda t: t[:-1]), CorruptFileError, rf"{UP}_scale .* \(95, 1\)"),
        ("nvfp4", replaced(f"{UP}_scale", lambda t: t[:, :-1]), CorruptFileError, rf"{UP}_scale .* \(96, 3\)"),
        ("nvfp4", replaced(f"{UP}_packed", lambda t: t[:, :-8]), CorruptFileError, UP),
        ("nvfp4", replaced(f"{UP}_scale", lambda t: t.float()), PrequantizedError, f"{UP}_scale .* is F32"),
        ("nvfp4", replaced(f"{UP}_global_scale", torch.zeros_like), CorruptFileError, f"{UP}_global_scale .* not zero"),
        ("nvfp4", replaced(f"{UP}_scale", with_nan), CorruptFileError, f"'{UP}_scale' holds NaN"),
        ("mxfp4", replaced(f"{UP}_scale", with_nan), CorruptFileError, f"'{UP}_scale' holds NaN"),
        ("fp8 channel", replaced(f"{UP}_scale", with_nan), CorruptFileError, f"'{UP}_scale' holds NaN"),
        ("fp8 channel", replaced(UP, with_nan), CorruptFileError, f"'{UP}' holds NaN"),
        (
            "fp8 channel",
            replaced(UP, lambda t: t.float().to(torch.float8_e5m2)),
            PrequantizedError,
            f"{UP} of .* is F8_E5M2",
        ),
        (
            "fp8 channel",
            lambda tensors: tensors.update({f"{UP}_zero_point": torch.zeros(96, 1)}),
            PrequantizedError,
            f"{UP}_zero_point",
        ),
    ],
)
def test_files_that_are_not_whole(tmp_path: Path, kind: str, change: Any, error: type[Exception], says: str) -> None:
    folder, _ = written(kind)
    copied(folder, tmp_path)
    tensors = load_file(tmp_path / FILE)
    change(tensors)
    save_file(tensors, tmp_path / FILE, {"format": "pt"})
    with pytest.raises(error, match=says) as caught:
        stream(tmp_path, KINDS[kind].format)
    assert str(tmp_path) in str(caught.value)
