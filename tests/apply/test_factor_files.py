"""``sparse_lora.factors``: a file of estimator factors, of this model and whole, or it is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparselora_dist.io.factors import FactorMismatchError
from sparselora_dist.io.manifest import CorruptFileError, read_safetensors, tensors_sha256
from support.applied import LAYERS, assert_identical, outputs, refuse, sparse_model
from support.models import tiny_lora


@pytest.fixture
def factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The factor file of the tiny Llama, rank 8."""
    monkeypatch.setenv("SPARSELORA_CACHE", str(tmp_path / "cache"))
    sparse_model()
    (file,) = (tmp_path / "cache" / "factors").iterdir()
    return file.rename(tmp_path / "factors.safetensors")


def test_a_factor_file_gives_the_model_of_the_cache(factors: Path) -> None:
    expected = outputs(sparse_model())
    assert_identical(expected, outputs(sparse_model(factors=str(factors))))
    # One of before there was a digest for each pair.
    tensors, metadata = read_safetensors(factors)
    del metadata["pairs"]
    save_file(tensors, factors, metadata)
    assert_identical(expected, outputs(sparse_model(factors=str(factors))))


def test_factors_of_another_model_rank_or_dtype(factors: Path) -> None:
    refuse(
        tiny_lora(seed=3), r"built from another model \('llama'\): layers.0", FactorMismatchError, factors=str(factors)
    )
    refuse(tiny_lora(), "factors of rank 8 .* needs rank 4", FactorMismatchError, factors=str(factors), rank=4)
    bf16 = tiny_lora(dtype=torch.bfloat16)
    refuse(bf16, "factors of dtype float32 .* needs dtype bfloat16", FactorMismatchError, factors=str(factors))
    more = {**LAYERS, "vo": {"0": 0.5}}
    refuse(
        tiny_lora(), "no factors of layers.0.self_attn.v_proj", FactorMismatchError, factors=str(factors), layers=more
    )


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif how == "header only":
        file.write_bytes(data[:100])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "flipped bit":
        data[-100] ^= 1
        file.write_bytes(data)
    else:
        tensors, metadata = read_safetensors(file)
        first, second = "layers.0.mlp.gate_proj.a", "layers.1.mlp.gate_proj.a"
        if how == "swapped":
            tensors[first], tensors[second] = tensors[second], tensors[first]
        else:
            del tensors[first]
        save_file({name: t.clone() for name, t in tensors.items()}, file, metadata)


@pytest.mark.parametrize("how", ["truncated", "header only", "empty", "flipped bit", "swapped", "missing"])
def test_a_damaged_factor_file_is_refused_by_name(factors: Path, how: str) -> None:
    damage(factors, how)
    refuse(tiny_lora(), str(factors), CorruptFileError, factors=str(factors))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            "transposed",
            r"layers.0.mlp.gate_proj.a is \(48, 8\) float32, but the matrix \(104, 48\) at rank 8 needs \(8, 48\)",
        ),
        ("short", r"layers.0.mlp.gate_proj.b is \(103, 8\) float32, but the matrix .* needs \(104, 8\)"),
        ("renamed", r"no factors of layers.0.mlp.gate_proj"),
        ("unasked", r"'layers.0.mlp.gate.a' .* names no matrix"),
        ("half", r"layers.0.mlp.gate_proj.a is \(8, 48\) float16"),
        ("infinite", r"layers.0.mlp.gate_proj.a holds NaN or Inf"),
        ("swapped", r"the factors under the name layers.\d.mlp.gate_proj are not those"),
    ],
)
def test_what_a_fitting_hash_does_not_vouch_for(factors: Path, how: str, words: str) -> None:
    """Refused when the file is read, not at the first sparse step."""
    tensors, metadata = read_safetensors(factors)
    a, b = "layers.0.mlp.gate_proj.a", "layers.0.mlp.gate_proj.b"
    if how == "transposed":
        tensors[a] = tensors[a].t().contiguous()
    elif how == "short":
        tensors[b] = tensors[b][:-1].contiguous()
    elif how == "renamed":
        tensors["layers.0.mlp.gate.a"] = tensors.pop(a)
    elif how == "unasked":
        tensors["layers.0.mlp.gate.a"] = tensors[a].clone()
    elif how == "half":
        tensors[a] = tensors[a].half()
    elif how == "infinite":
        tensors[a][0, 0] = float("inf")
    else:
        for side in "ab":
            one, other = f"layers.0.mlp.gate_proj.{side}", f"layers.1.mlp.gate_proj.{side}"
            tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()
    if how != "swapped":  # As files were before, without what only that one is seen by.
        del metadata["pairs"]
    save_file(tensors, factors, metadata | {"sha256": tensors_sha256(tensors)})
    refuse(tiny_lora(), f"{factors}.*{words}", ValueError, factors=str(factors))


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.trace),))


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    file, trace = tmp_path / "factors.safetensors", tmp_path / "payload-ran"
    torch.save({"a": Payload(trace)}, file)
    refuse(tiny_lora(), "not a safetensors file", CorruptFileError, factors=str(file))
    assert not trace.exists()


def test_a_missing_or_foreign_file(tmp_path: Path) -> None:
    refuse(tiny_lora(), "no such file", FileNotFoundError, factors=str(tmp_path / "nothing.safetensors"))
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    refuse(tiny_lora(), "not a factor file", CorruptFileError, factors=str(tmp_path / "x.safetensors"))
