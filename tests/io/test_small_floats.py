"""Checkpoints in fp8, nvfp4 and mxfp4, as they are downloaded: their own values, on any rank, in either orientation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparselora_dist import SparseLoRAConfig, apply_sparselora
from sparselora_dist.codecs import FloatsCodec, PlainCodec, codec_named
from sparselora_dist.config import ModelSection, QuantizationSection
from sparselora_dist.io.load import LoadedBase, load_base
from sparselora_dist.io.manifest import CorruptFileError
from sparselora_dist.io.prequantized import PrequantizedError, stored_matrix
from sparselora_dist.io.shard_files import TensorFiles
from sparselora_dist.io.zeros import model_zeros
from sparselora_dist.layouts import decoder_layers, matrix_name
from sparselora_dist.sharding.placement import Placement, RowShards
from support.every_type import tiny_model
from support.merging import save_base
from support.models import ALL_LINEAR, batch
from support.nf4_workers import adapted
from support.small_floats import FILE, KINDS, SHAPE, write_checkpoint

SPARSE = {"layers": {group: {"0-1": 0.5} for group in ("ffn", "qk", "vo")}}
TURNED = ("o_proj", "down_proj")
Q, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"


def stream(folder: Path, format: Any = None) -> LoadedBase:
    section = ModelSection(name_or_path=str(folder), dtype="float32")
    return load_base(section, QuantizationSection(format=format), Placement(torch.device("cpu")))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Tensor]]]:
    made: dict[str, tuple[Path, dict[str, Tensor]]] = {}

    def of(kind: str) -> tuple[Path, dict[str, Tensor]]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("model")
            made[kind] = folder, write_checkpoint(folder, kind)
        return made[kind]

    return of


# --- what is loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_checkpoints_own(written: Any, kind: str) -> None:
    folder, means = written(kind)
    form = KINDS[kind].format
    loaded = stream(folder, form)
    for layer in decoder_layers(loaded.model):
        for name in ALL_LINEAR:
            linear: Any = layer.matrix(name)
            matrix = means[f"model.{matrix_name(layer.index, name)}.weight"]
            assert matrix.isfinite().all() and matrix.unique().numel() > 8
            assert isinstance(linear.codec, FloatsCodec) and linear.codec.name == form
            assert linear.transposed == (name in TURNED)
            assert torch.equal(linear.matrix(linear.parts, torch.float32), matrix)
            assert torch.equal(loaded.weights.get(layer.index, name), matrix)
            assert loaded.weights.shape(layer.index, name) == tuple(matrix.shape)
    stored = sum(p.nbytes for layer in decoder_layers(loaded.model) for n in ALL_LINEAR for p in layer.matrix(n).parts)
    held = {key: t for key, t in load_file(folder / FILE).items() if key.split(".")[-2] in ALL_LINEAR}
    own = {key: t for key, t in held.items() if key.split(".")[-1] not in KINDS[kind].besides}
    widened = {torch.bfloat16: 2}.get(KINDS[kind].dtype, 1)  # Scales in bf16 are kept in fp32.
    assert stored == sum(t.nbytes * (widened if key.endswith("scale") else 1) for key, t in own.items())


@pytest.mark.parametrize("kind", ["fp8 tensor", "fp8 channel", "fp8 block", "nvfp4", "modelopt nvfp4", "mxfp4"])
@pytest.mark.parametrize("transposed", [False, True], ids=["as it is", "transposed"])
def test_ranks_read_parts_of_the_whole(written: Any, kind: str, transposed: bool) -> None:
    folder, means = written(kind)
    checkpoint = TensorFiles.of_model(folder)
    found = stored_matrix(checkpoint, UP)
    assert found is not None
    channels, length = found.shape[:: -1 if transposed else 1]
    codec = found.codec(codec_named(KINDS[kind].format, 8), transposed)
    parts = codec.parts(length)
    whole = {name: found.part(name, 0, part.rows(channels), transposed) for name, part in parts.items()}
    for name, part in parts.items():
        assert whole[name].shape == (part.rows(channels), part.width) and whole[name].dtype == part.dtype
        for size in (2, 3, 7):
            shares = [RowShards(torch.device("cpu"), rank, size) for rank in range(size)]
            spans = [share.rows(part.rows(channels), [part.width]) for share in shares]
            pieces = [found.part(name, start, stop, transposed) for start, stop in spans]
            assert torch.equal(torch.cat(pieces), whole[name])
    for start, stop in ((0, 5), (5, 6), (17, 96), (96, 96)):  # Rows of values, from anywhere.
        assert torch.equal(found.rows(start, stop), means[UP][start:stop])
        assert torch.equal(found.kept(start, stop), means[UP][start:stop] != 0)


def test_what_was_left_as_it_is_stays_plain(tmp_path: Path) -> None:
    left = ("layers.1.mlp.down_proj", "layers.0.self_attn.q_proj")
    means = write_checkpoint(tmp_path, "nvfp4", left=left)
    loaded, plain = stream(tmp_path, "nvfp4"), set()
    for layer in decoder_layers(loaded.model):
        for name in ALL_LINEAR:
            linear: Any = layer.matrix(name)
            if isinstance(linear.codec, PlainCodec):
                plain.add((layer.index, name))
            matrix = means[f"model.{matrix_name(layer.index, name)}.weight"]
            assert torch.equal(linear.matrix(linear.parts, torch.float32), matrix)
    assert plain == {(1, "down_proj"), (0, "q_proj")}


@pytest.mark.parametrize("kind", ["fp8 channel", "nvfp4", "modelopt nvfp4"])
def test_zeros_are_counted_by_codes(written: Any, kind: str) -> None:
    folder, means = written(kind)
    looked = {matrix.name: matrix for matrix in model_zeros(folder).matrices}
    assert looked.keys() == {key.removesuffix(".weight") for key in means} | {"lm_head", "model.embed_tokens"}
    for key, matrix in means.items():
        found = looked[key.removesuffix(".weight")]
        assert (found.values, found.zeros) == (matrix.numel(), int((matrix == 0).sum()))


def test_a_quantised_head_is_kept_in_values(written: Any, tmp_path: Path) -> None:
    folder, _ = written("fp8 tensor")
    copied(folder, tmp_path)
    tensors = load_file(tmp_path / FILE)
    scale = torch.tensor([0.5])
    held = {
        "lm_head.weight": (tensors["lm_head.weight"] / scale).to(torch.float8_e4m3fn),
        "lm_head.weight_scale": scale,
    }
    save_file(tensors | held, tmp_path / FILE, {"format": "pt"})
    model = stream(tmp_path, "fp8").model
    assert torch.equal(model.lm_head.weight, held["lm_head.weight"].float() * scale)


def test_modelopts_own_file_is_enough(written: Any, tmp_path: Path) -> None:
    folder, means = written("modelopt nvfp4")
    copied(folder, tmp_path)
    edit(tmp_path, lambda settings: None)
    told = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    path = tmp_path / "hf_quant_config.json"
    path.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": told}))
    loaded = stream(tmp_path, "nvfp4")
    assert torch.equal(loaded.weights.get(1, "up_proj"), means[UP])
    path.write_text(json.dumps({"quantization": told | {"quant_algo": "INT4_AWQ"}}))
    with pytest.raises(PrequantizedError, match="quant_algo 'INT4_AWQ'"):
        stream(tmp_path, "nvfp4")
    path.unlink()
    with pytest.raises(PrequantizedError, match=r"q_proj.weight of .* stored as U8, and no quantization_config"):
        stream(tmp_path, "nvfp4")


@pytest.mark.parametrize("kind", ["fp8 block", "modelopt fp8", "nvfp4", "modelopt nvfp4", "mxfp4"])
def test_a_trained_step_is_that_of_the_values(tmp_path: Path, kind: str) -> None:
    """Masks, loss and gradients: what a plain model of the same values gives, down to the last bit that sums keep."""
    means, plain = write_checkpoint(tmp_path / "stored", kind), tmp_path / "plain"
    save_base(plain, **SHAPE)
    save_file(load_file(plain / FILE) | means, plain / FILE, {"format": "pt"})
    seen = []
    for folder, form in ((tmp_path / "stored", KINDS[kind].format), (plain, None)):
        loaded = stream(folder, form)
        model = adapted(loaded.model, "single", ALL_LINEAR)
        apply_sparselora(model, SparseLoRAConfig.from_dict(SPARSE), weights=loaded.weights)
        loss = model(**batch()).loss
        loss.backward()
        seen.append({"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    stored, values = seen
    assert stored.keys() == values.keys() and len(stored) == 1 + 2 * 2 * len(ALL_LINEAR)
    for name, value in values.items():
        torch.testing.assert_close(
            stored[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- what is refused --------------------------------------------------------------------------------------------------


def copied(folder: Path, to: Path) -> None:
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a folder's ``quantization_config``; without a result it is dropped."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = change(config.get("quantization_config", {}))
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("kind", ["fp8 channel", "nvfp4", "mxfp4", "modelopt nvfp4", "fine-grained"])
@pytest.mark.parametrize("asked", [None, "nf4", "another"])
def test_a_run_that_asks_for_something_else(written: Any, kind: str, asked: str | None) -> None:
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
def test_settings_that_are_not_read(written: Any, tmp_path: Path, kind: str, change: Any, says: str) -> None:
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
def test_files_that_are_not_whole(
    written: Any, tmp_path: Path, kind: str, change: Any, error: type[Exception], says: str
) -> None:
    folder, _ = written(kind)
    copied(folder, tmp_path)
    tensors = load_file(tmp_path / FILE)
    change(tensors)
    save_file(tensors, tmp_path / FILE, {"format": "pt"})
    with pytest.raises(error, match=says) as caught:
        stream(tmp_path, KINDS[kind].format)
    assert str(tmp_path) in str(caught.value)


def test_routed_experts_are_refused(tmp_path: Path) -> None:
    """Not read in silence as values without their scales."""
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    key = "model.layers.2.mlp.experts.3.up_proj.weight"
    tensors |= {key: tensors[key].to(torch.float8_e4m3fn), f"{key}_scale_inv": torch.tensor(1.0)}
    save_file(tensors, tmp_path / FILE, {"format": "pt"})
    edit(tmp_path, lambda settings: {"quant_method": "fp8", "weight_block_size": None})
    with pytest.raises(ValueError, match=rf"quantised, as '{key}': routed experts"):
        stream(tmp_path, "fp8")
