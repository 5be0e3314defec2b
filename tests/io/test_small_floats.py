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

from sparselora_dist.codecs import FloatsCodec, PlainCodec, codec_named
from sparselora_dist.config import ModelSection, QuantizationSection
from sparselora_dist.io.load import LoadedBase, load_base
from sparselora_dist.io.manifest import CorruptFileError
from sparselora_dist.io.prequantized import PrequantizedError, stored_matrix
from sparselora_dist.io.shard_files import TensorFiles
from sparselora_dist.layouts import decoder_layers, matrix_name
from sparselora_dist.sharding.placement import Placement, RowShards
from support.models import ALL_LINEAR
from support.small_floats import FILE, KINDS, write_checkpoint

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
    held = {key: t for key, t in load_file(folder / FILE).items() if key.rpartition(".")[0].endswith(ALL_LINEAR_ENDS)}
    besides = KINDS[kind].besides
    widened = {torch.bfloat16: 2}.get(KINDS[kind].dtype, 1)  # Scales in bf16 are kept in fp32.
    expected = sum(
        t.nbytes * (widened if key.endswith("scale") else 1) for key, t in held.items() if key.rpartition(".")[2] not in besides
    )
    assert stored == expected


ALL_LINEAR_ENDS = tuple(ALL_LINEAR)


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
