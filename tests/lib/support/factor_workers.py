"""The same estimator factors from every kind of weights, built by several ranks; and bad files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparselora_dist.codecs import PlainCodec
from sparselora_dist.io import factors as factor_files
from sparselora_dist.io.load import load_base
from sparselora_dist.io.shard_files import TensorFiles
from sparselora_dist.io.weights import CheckpointWeights, ModelWeights
from sparselora_dist.sharding.parameters import is_dtensor, is_zero3

from .engine_parts import make_engine, refusal, run_config
from .models import tiny_base

MATRICES = [(layer, f"{name}_proj") for layer in range(3) for name in ("gate", "k", "q", "up", "v")]
_MODEL: dict[str, Any] = {"rank": 4, "model_id": "tiny", "model_config": {"model_type": "llama"}}


def _factors(weights: Any, path: Path) -> dict[str, Any]:
    """Build into an empty cache; the result and how many matrices this rank decomposed."""
    calls: list[int] = []
    original = factor_files.low_rank_factors

    def low_rank_factors(weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(weight.numel())
        return original(weight, *args, **kwargs)

    factor_files.low_rank_factors = low_rank_factors
    try:
        os.environ[factor_files.CACHE_VARIABLE] = str(path)
        built = factor_files.load_or_build(weights, MATRICES, **_MODEL)
        first = len(calls)
        again = factor_files.load_or_build(weights, MATRICES, **_MODEL)
    finally:
        factor_files.low_rank_factors = original
    files = sorted(file.name for file in path.rglob("*.safetensors"))
    return {"factors": built, "calls": first, "again": again, "calls again": len(calls) - first, "files": files}


def _files(folder: Path) -> CheckpointWeights:
    return CheckpointWeights(TensorFiles.of_model(folder), PlainCodec(torch.float32), torch.float32)


def factors(folder: str, bad_files: dict[str, str]) -> dict[str, Any]:
    """The same factors from every kind of weights, and bad files."""
    root = Path(folder)
    seen: dict[str, Any] = {}
    plain = tiny_base()
    if dist.get_rank() == 0:
        plain.save_pretrained(root / "model")
        plain.save_pretrained(root / "pieces", max_shard_size="60KB")
    dist.barrier()
    seen["pieces"] = len(list((root / "pieces").glob("*.safetensors")))
    seen["plain"] = _factors(ModelWeights(plain), root / "plain")
    seen["files"] = _factors(_files(root / "model"), root / "files")
    seen["pieces of files"] = _factors(_files(root / "pieces"), root / "pieces-cache")

    config = run_config("zero3", folder=str(root / "model"))
    partitioned = load_base(config.model, config.quantization, make_engine(config).placement()).model
    assert all(is_zero3(p) for p in partitioned.parameters())
    seen["partitioned"] = _factors(ModelWeights(partitioned), root / "zero3")
    seen["still partitioned"] = all(p.numel() == 0 for p in partitioned.parameters())

    engine = make_engine(run_config("fsdp2"))
    sharded = tiny_base()
    engine.prepare(sharded)
    assert all(is_dtensor(p) for p in sharded.parameters())
    seen["dtensors"] = _factors(ModelWeights(sharded), root / "fsdp2")

    class Failing(CheckpointWeights):
        def get(self, layer: int, name: str) -> Tensor:
            if dist.get_rank() == dist.get_world_size() - 1:
                raise ValueError(f"cannot read layer {layer}")
            return super().get(layer, name)

    broken = Failing(TensorFiles.of_model(root / "model"), PlainCodec(torch.float32), torch.float32)
    seen["one fails"] = refusal(lambda: _factors(broken, root / "failing"))

    seen["bad"] = {}
    for name, path in bad_files.items():
        try:
            factor_files.load_or_build(ModelWeights(plain), MATRICES, path=path, **_MODEL)
            seen["bad"][name] = "accepted"
        except Exception as error:
            seen["bad"][name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    return seen
