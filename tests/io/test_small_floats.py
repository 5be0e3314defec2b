"""Checkpoints in fp8, nvfp4 and mxfp4, as they are downloaded: their own values, on any rank, in either orientation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparselora_dist import SparseLoRAConfig, apply_sparselora
from sparselora_dist.codecs import FloatsCodec, PlainCodec, codec_named
from sparselora_dist.io.prequantized import PrequantizedError, compressed_tensors, fine_grained, modelopt, stored_matrix
from sparselora_dist.io.shard_files import TensorFiles
from sparselora_dist.io.zeros import model_zeros
from sparselora_dist.layouts import decoder_layers, matrix_name
from sparselora_dist.sharding.placement import RowShards
from sparselora_dist.train.fingerprint import model_digest
from support.merging import save_base
from support.models import ALL_LINEAR, batch
from support.nf4_workers import adapted
from support.small_floats import FILE, KINDS, SHAPE, copied, edit, stream, write_checkpoint, written

SPARSE = {"layers": {group: {"0-1": 0.5} for group in ("ffn", "qk", "vo")}}
TURNED = ("o_proj", "down_proj")
Q, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"


# --- what is loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_checkpoints_own(kind: str) -> None:
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
def test_ranks_read_parts_of_the_whole(kind: str, transposed: bool) -> None:
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
def test_zeros_are_counted_by_codes(kind: str) -> None:
    folder, means = written(kind)
    looked = {matrix.name: matrix for matrix in model_zeros(folder).matrices}
    assert looked.keys() == {key.removesuffix(".weight") for key in means} | {"lm_head", "model.embed_tokens"}
    for key, matrix in means.items():
        found = looked[key.removesuffix(".weight")]
        assert (found.values, found.zeros) == (matrix.numel(), int((matrix == 0).sum()))


def test_a_quantised_head_is_kept_in_values(tmp_path: Path) -> None:
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


def test_modelopts_own_file_is_enough(tmp_path: Path) -> None:
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
        stream(tmp_path)


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


def test_a_scale_tells_one_model_from_another(tmp_path: Path) -> None:
    """To the estimator's factors and to the checkpoints of a run: also where the codes are the same."""
    folder, _ = written("modelopt nvfp4")
    copied(folder, tmp_path)
    tensors = load_file(tmp_path / FILE)
    save_file(tensors | {f"{UP}_scale_2": tensors[f"{UP}_scale_2"] * 2}, tmp_path / FILE, {"format": "pt"})
    mine, other = (stored_matrix(TensorFiles.of_model(path), UP) for path in (folder, tmp_path))
    assert mine is not None and other is not None and mine.mark() != other.mark()
    assert model_digest(folder) != model_digest(tmp_path)


@pytest.mark.parametrize(
    ("reader", "settings", "left"),
    [
        (compressed_tensors, {"ignore": ["re:.*self_attn.*", "lm_head"]}, True),
        (compressed_tensors, {"ignore": ["model.layers.1.mlp.up_proj"]}, False),
        (compressed_tensors, {"targets": ["re:.*mlp.*"]}, True),
        (modelopt, {"exclude_modules": ["model.layers.1*", "lm_head"]}, True),
        (modelopt, {"ignore": ["model.layers.1.self_attn"]}, True),
        (modelopt, {"quantized_layers": {"model.layers.0.self_attn.q_proj": {}}}, True),
        (modelopt, {"ignore": ["model.layers.0.*"]}, False),
        (fine_grained, {"modules_to_not_convert": ["lm_head", "q_proj"]}, True),
        (fine_grained, {"ignored_layers": ["model.layers.10"]}, False),
        (fine_grained, {"modules_to_not_convert": ["model.layers.1.self_attn.q"]}, False),
    ],
)
def test_what_a_config_says_is_left(reader: Any, settings: dict[str, Any], left: bool) -> None:
    """For plans, which see no tensors."""
    targets = settings.pop("targets", ["Linear"])
    groups = {"config_groups": {"group_0": {"targets": targets, "weights": {"num_bits": 8}}}}
    assert reader.READER.left(groups | settings, "model.layers.1.self_attn.q_proj") is left
