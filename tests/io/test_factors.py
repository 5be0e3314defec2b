"""Estimator factors on disk: built once, and the same from a model as from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparselora_dist.codecs import PlainCodec
from sparselora_dist.io import factors
from sparselora_dist.io.factors import FactorMismatchError, load_or_build
from sparselora_dist.io.manifest import CorruptFileError, read_safetensors
from sparselora_dist.io.shard_files import TensorFiles
from sparselora_dist.io.weights import CheckpointWeights, ModelWeights, WeightSource, fingerprint
from sparselora_dist.method.channels import FFN
from support.models import tiny_base

MATRICES = [(layer, name) for layer in range(3) for name in ("gate_proj", "k_proj", "q_proj", "up_proj", "v_proj")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSELORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "factors"


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the matrices that an SVD was taken of."""
    shapes: list[tuple[int, ...]] = []
    original = factors.low_rank_factors

    def counted(weight: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        shapes.append(tuple(weight.shape))
        return original(weight, *args, **options)

    monkeypatch.setattr(factors, "low_rank_factors", counted)
    return shapes


def build(weights: WeightSource, rank: int = 4, **options: Any) -> factors.FactorSet:
    return load_or_build(weights, MATRICES, rank=rank, model_id="org/tiny", model_config={"layers": 3}, **options)


def assert_equal(first: factors.FactorSet, second: factors.FactorSet) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(a, b) for matrix in first for a, b in zip(first[matrix], second[matrix]))


def files_of(folder: Path, dtype: torch.dtype = torch.float32) -> CheckpointWeights:
    return CheckpointWeights(TensorFiles.of_model(folder), PlainCodec(dtype), dtype)


def save(folder: Path, sharded: bool, **overrides: Any) -> Any:
    model = tiny_base(**overrides)
    model.save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
    assert (folder / "model.safetensors.index.json").is_file() == sharded
    return model


def test_a_matrix_with_nan_in_memory(cache: Path) -> None:
    """Where no file was streamed: an error of LAPACK would name nothing."""
    base = tiny_base()
    base.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight of org/tiny holds NaN or Inf"):
        build(ModelWeights(base))
    assert not cache.exists()


# --- cache -----------------------------------------------------------------------------------------------------------


def test_the_second_time_nothing_is_decomposed(cache: Path, decomposed: list) -> None:
    first = build(ModelWeights(tiny_base()))
    assert len(decomposed) == len(MATRICES)
    (file,) = cache.iterdir()
    assert file.name.startswith("tiny-") and file.name.endswith("-r4-float32.safetensors")
    assert_equal(first, build(ModelWeights(tiny_base())))
    assert len(decomposed) == len(MATRICES)


def test_another_rank_dtype_or_model_has_a_file_of_its_own(cache: Path, decomposed: list) -> None:
    for base, rank in (
        (tiny_base(), 4),
        (tiny_base(), 5),
        (tiny_base(dtype=torch.bfloat16), 4),
        (tiny_base(seed=1), 4),
    ):
        build(ModelWeights(base), rank)
    assert len(list(cache.iterdir())) == 4
    assert len(decomposed) == 4 * len(MATRICES)


def test_a_damaged_cache_is_not_used_silently(cache: Path) -> None:
    build(ModelWeights(tiny_base()))
    (file,) = cache.iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 128
    file.write_bytes(data)
    with pytest.raises(CorruptFileError, match=f"{file.name} is damaged: SHA-256 .* Delete it"):
        build(ModelWeights(tiny_base()))
    file.unlink()
    build(ModelWeights(tiny_base()))


def test_the_file_says_what_it_is(cache: Path) -> None:
    built = build(ModelWeights(tiny_base()))
    (file,) = cache.iterdir()
    tensors, metadata = read_safetensors(file)
    assert metadata["model"] == "org/tiny" and metadata["rank"] == "4" and metadata["dtype"] == "float32"
    assert len(metadata["sha256"]) == 64 and len(json.loads(metadata["fingerprints"])) == len(MATRICES)
    assert torch.equal(tensors["layers.2.self_attn.k_proj.a"], built[2, "k_proj"][0])
    assert len(list(file.parent.iterdir())) == 1, "a temporary file was left"


def test_a_given_file_is_never_built_over(tmp_path: Path, decomposed: list) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build(ModelWeights(tiny_base()), path=tmp_path / "nowhere.safetensors")
    assert not decomposed


@pytest.mark.parametrize("kind", ["pickle", "folder", "safetensors"])
def test_official_estimator_files_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / {"pickle": "layers.0.mlp_low_rank_a.pt", "folder": "r_8", "safetensors": "f.safetensors"}[kind]
    if kind == "pickle":
        torch.save(torch.zeros(2, 48, 4), path)
    elif kind == "folder":
        path.mkdir()
    else:
        save_file({"model.layers.0.mlp.gate_proj.w1": torch.zeros(48, 4)}, path)
    with pytest.raises(FactorMismatchError, match=rf"{path.name} looks like estimator files of the official.*remove"):
        build(ModelWeights(tiny_base()), path=path)


# --- from files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpoint_files_give_the_factors_of_the_model(
    tmp_path: Path, cache: Path, sharded: bool, dtype: torch.dtype
) -> None:
    model = save(tmp_path / "model", sharded)
    from_files = build(files_of(tmp_path / "model", dtype))
    (file,) = cache.iterdir()
    file.unlink()
    assert_equal(from_files, build(ModelWeights(model.to(dtype))))
    assert next(cache.iterdir()).name == file.name, "the identity differs"


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_every_matrix_can_be_read(tmp_path: Path, sharded: bool) -> None:
    weights = ModelWeights(save(tmp_path, sharded))
    files = files_of(tmp_path)
    for layer in range(3):
        for name in (*FFN, "q_proj", "k_proj", "v_proj", "o_proj"):
            assert torch.equal(files.get(layer, name), weights.get(layer, name))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save(tmp_path, sharded=True)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["model.layers.1.mlp.gate_proj.weight"]
    (tmp_path / shard).unlink()
    with pytest.raises(FileNotFoundError, match=rf"names files that are not there: {shard}"):
        files_of(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    save(tmp_path, sharded=False)
    files = files_of(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CorruptFileError, match=rf"{file} is truncated"):
        files_of(tmp_path)
    with pytest.raises(CorruptFileError, match=str(file)):
        files.get(0, "q_proj")


@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
def test_an_index_cannot_name_files_outside_its_folder(tmp_path: Path, absolute: bool) -> None:
    folder = tmp_path / "model"
    save(folder, sharded=True)
    key, path = "model.layers.0.mlp.up_proj.weight", folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = folder / index["weight_map"][key]
    shard.rename(tmp_path / "outside.safetensors")
    index["weight_map"][key] = str(tmp_path / "outside.safetensors") if absolute else "../outside.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CorruptFileError, match="of its own folder"):
        files_of(folder).get(0, "up_proj")


def test_an_unknown_matrix_or_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        files_of(tmp_path)
    save(tmp_path, sharded=False)
    with pytest.raises(CorruptFileError, match=r"model.layers.9.mlp.gate_proj.weight"):
        files_of(tmp_path).get(9, "gate_proj")


# --- identity --------------------------------------------------------------------------------------------------------


def test_fingerprints_tell_matrices_apart() -> None:
    weight = torch.randn(30, 20)
    changed = weight.clone()
    changed[17, 3] += 1
    marks = [fingerprint(w) for w in (weight, changed, weight.t().contiguous(), weight.view(20, 30))]
    assert len(set(marks)) == 4
    assert fingerprint(weight.clone()) == marks[0]


def test_factors_of_a_changed_model_are_refused(cache: Path) -> None:
    model = tiny_base()
    build(ModelWeights(model))
    (file,) = cache.iterdir()
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight[0, 0] += 1
    with pytest.raises(
        FactorMismatchError, match=r"built from another model \('org/tiny'\): layers.2.self_attn.v_proj"
    ):
        build(ModelWeights(model), path=file)
