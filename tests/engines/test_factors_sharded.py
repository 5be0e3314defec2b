"""Estimator factors from every kind of weights, built by all ranks together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparselora_dist.io.factors import FORMAT, read_factors, write_factors
from sparselora_dist.io.manifest import tensors_sha256
from sparselora_dist.io.weights import ModelWeights, fingerprint
from sparselora_dist.method.estimator import low_rank_factors
from support.factor_workers import MATRICES
from support.harness import run_ranks
from support.models import tiny_base

SOURCES = ["plain", "partitioned", "dtensors", "files", "pieces of files"]
RANK = 4


@pytest.fixture(scope="module")
def weights() -> ModelWeights:
    return ModelWeights(tiny_base())


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory, weights: ModelWeights) -> dict[str, str]:
    """A good file and what can become of it."""
    folder = tmp_path_factory.mktemp("bad")
    marks = {matrix: fingerprint(weights.get(*matrix)) for matrix in MATRICES}
    built = {matrix: low_rank_factors(weights.get(*matrix), RANK) for matrix in MATRICES}
    paths = {name: folder / f"{name}.safetensors" for name in ("good", "truncated", "flipped", "bare")}
    write_factors(paths["good"], built, marks, rank=RANK, model_id="tiny")
    whole = paths["good"].read_bytes()
    paths["truncated"].write_bytes(whole[: len(whole) // 2])
    paths["flipped"].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    # A checksum that fits and metadata that is incomplete.
    tensors = load_file(paths["good"])
    metadata = {"format": FORMAT, "rank": str(RANK), "dtype": "float32", "sha256": tensors_sha256(tensors)}
    save_file(tensors, paths["bare"], metadata)
    paths["other rank"] = folder / "rank.safetensors"
    other = {matrix: low_rank_factors(weights.get(*matrix), 2) for matrix in MATRICES}
    write_factors(paths["other rank"], other, marks, rank=2, model_id="tiny")
    paths["missing"] = folder / "nowhere.safetensors"
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, bad_files: dict[str, str]) -> list[dict[str, Any]]:
    return run_ranks("support.factor_workers:factors", 2, str(tmp_path_factory.mktemp("factors")), bad_files)


def assert_same_factors(expected: Any, got: Any) -> None:
    assert list(got) == MATRICES
    for matrix in MATRICES:
        for left, right in zip(expected[matrix], got[matrix]):
            assert torch.equal(left, right), matrix


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_factors(two: Any, source: str) -> None:
    for rank in two:
        assert_same_factors(two[0]["plain"]["factors"], rank[source]["factors"])
    assert two[0]["pieces"] > 2 and two[0]["still partitioned"]


def test_they_are_the_factors_of_the_weights(two: Any, weights: ModelWeights) -> None:
    for matrix, (a, b) in two[1]["plain"]["factors"].items():
        assert (a.shape[0], b.shape[1]) == (RANK, RANK)
        expected_a, expected_b = low_rank_factors(weights.get(*matrix), RANK)
        assert (b @ a - expected_b @ expected_a).abs().max() < 1e-5, matrix


@pytest.mark.parametrize("source", SOURCES)
def test_the_work_is_spread_and_cached(two: Any, source: str) -> None:
    calls = [rank[source]["calls"] for rank in two]
    assert sum(calls) == len(MATRICES) and abs(calls[0] - calls[1]) <= 1, calls
    for rank in two:
        # One cache file, by rank 0; the second time nobody decomposes anything.
        assert len(rank[source]["files"]) == 1
        assert rank[source]["calls again"] == 0
        assert_same_factors(rank[source]["factors"], rank[source]["again"])


def test_every_source_finds_the_others_cache(two: Any) -> None:
    """The identity of the model is that of its weights, not of where they came from."""
    assert len({rank[source]["files"][0] for rank in two for source in SOURCES}) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("truncated", ("CorruptFileError", "truncated.safetensors is truncated")),
        ("flipped", ("CorruptFileError", "flipped.safetensors is damaged", "SHA-256")),
        ("bare", ("CorruptFileError", "bare.safetensors", "fingerprints")),
        ("other rank", ("FactorMismatchError", "rank.safetensors", "rank 2", "needs rank 4")),
        ("missing", ("FileNotFoundError", "nowhere.safetensors")),
    ],
)
def test_a_bad_file_is_refused_on_every_rank(two: Any, name: str, words: tuple[str, ...]) -> None:
    messages = [rank["bad"][name] for rank in two]
    assert messages[0] == messages[1]
    assert all(word in messages[0] for word in words), messages[0]


def test_a_good_file_is_accepted(two: Any, bad_files: dict[str, str], weights: ModelWeights) -> None:
    assert [rank["bad"]["good"] for rank in two] == ["accepted"] * 2
    marks = {matrix: fingerprint(weights.get(*matrix)) for matrix in MATRICES}
    path = Path(bad_files["good"])
    found = read_factors(path, MATRICES, marks, rank=RANK, dtype=torch.float32, model_id="tiny")
    assert list(found) == MATRICES


def test_one_ranks_failure_ends_all(two: Any) -> None:
    """The other rank does not wait for factors that never come."""
    *others, last = (rank["one fails"] for rank in two)
    assert "cannot read layer" in last and "rank" not in last
    assert all("rank 1 could not go on: cannot read layer" in message for message in others)
