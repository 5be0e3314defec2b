"""Estimator factors: built once per base model, rank and choice of layers, spread over ranks, cached, verified.

A factor file is safetensors: ``<matrix>.a`` (r, in) and ``<matrix>.b`` (out, r) with the matrix named as in
:func:`sparselora_dist.layouts.matrix_name`. Its metadata holds the model it was built from, the rank, the dtype, a
fingerprint of every matrix, a SHA-256 over the tensors, and one over each matrix's pair and that matrix's fingerprint. A
file that does not match the model is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from ..layouts import matrix_name
from ..method.estimator import low_rank_factors
from ..sharding.placement import OtherRankError
from ..sync.everyone import everyone
from .manifest import CorruptFileError, publish, read_safetensors, tensors_sha256
from .shard_files import is_finite
from .weights import WeightSource

log = logging.getLogger(__name__)

FORMAT = "sparselora-factors/1"
CACHE_VARIABLE = "SPARSELORA_CACHE"
_EXACT_BLOCK_SIDE = 256

Matrix = tuple[int, str]
FactorSet = dict[Matrix, tuple[Tensor, Tensor]]


class FactorMismatchError(ValueError):
    """A factor file belongs to another model, rank or dtype, or lacks matrices that are needed."""


def cache_path(model_id: str, identity: str, rank: int, dtype: torch.dtype) -> Path:
    """Where the factors of a model are cached: ``$SPARSELORA_CACHE``, or ``~/.cache/sparselora_dist``."""
    root = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "sparselora_dist")
    stem = Path(model_id).name or "model"
    return root / "factors" / f"{stem}-{identity[:16]}-r{rank}-{_name(dtype)}.safetensors"


def load_or_build(
    weights: WeightSource,
    matrices: Sequence[Matrix],
    *,
    rank: int,
    model_id: str,
    model_config: Mapping[str, Any],
    path: str | Path | None = None,
    group: dist.ProcessGroup | None = None,
) -> FactorSet:
    """Factors of ``matrices``: from ``path`` if given, else from the cache, the missing ones built and cached.

    Every rank must call this with the same arguments. Each matrix is read and decomposed by one rank; all get all factors.

    Args:
        weights: gives the frozen matrices.
        matrices: ``(layer, name)`` pairs.
        rank: of the factors.
        model_id: name or path of the base model, for messages and the file name.
        model_config: shape keys that identify the architecture.
        path: a factor file that must hold everything; ``None`` uses the cache.
        group: ranks to spread the work over; the default group if there is one.

    Raises:
        FactorMismatchError, CorruptFileError, FileNotFoundError: the file is named.
    """
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD) if dist.is_initialized() else [0]
    me = dist.get_rank() if dist.is_initialized() else 0
    marks, dtype = _marks(weights, matrices, ranks, group), weights.dtype
    identity = hashlib.sha256(
        json.dumps([dict(model_config), sorted((*m, v) for m, v in marks.items())], sort_keys=True).encode()
    ).hexdigest()
    target = Path(path) if path else cache_path(model_id, identity, rank, dtype)

    found: FactorSet = {}
    error: Exception | None = None
    if me == ranks[0] and (path or target.is_file()):
        try:
            found = read_factors(target, matrices, marks, rank=rank, dtype=dtype, model_id=model_id)
            _check_shapes(target, found, weights, rank, dtype)
        except Exception as problem:  # Whatever it is, the other ranks wait to hear of it.
            error = problem
    state: list[Any] = [error, list(found)]
    if len(ranks) > 1:
        dist.broadcast_object_list(state, src=ranks[0], group=group)
    if state[0] is not None:
        raise state[0]
    owners = dict.fromkeys(state[1], ranks[0])
    missing = [matrix for matrix in matrices if matrix not in owners]
    owners |= {matrix: ranks[number % len(ranks)] for number, matrix in enumerate(missing)}

    def build() -> None:
        for matrix in missing:
            if owners[matrix] == me or weights.collective:
                weight = weights.get(*matrix)
                if owners[matrix] == me:
                    if not is_finite(weight):
                        raise ValueError(
                            f"{matrix_name(*matrix)}.weight of {model_id} holds NaN or Inf: no factors can be made of it"
                        )
                    found[matrix] = _decompose(weight, weights.blocks(*matrix), rank, _seed(matrix))

    _together(build, ranks, group)
    if len(ranks) > 1:
        found = {matrix: _share(found.get(matrix), owners[matrix], group) for matrix in matrices}
    if missing and me == ranks[0]:
        try:
            write_factors(target, found, marks, rank=rank, model_id=model_id)
        except OSError as problem:
            log.warning("factors not cached, they will be built again: %s (set %s)", problem, CACHE_VARIABLE)
    return found


def _marks(
    weights: WeightSource, matrices: Sequence[Matrix], ranks: Sequence[int], group: dist.ProcessGroup | None
) -> dict[Matrix, str]:
    """What each matrix holds. Where every rank can read alone, the work is dealt out."""
    if weights.collective or len(ranks) == 1:
        return {matrix: weights.mark(*matrix) for matrix in matrices}
    own = matrices[ranks.index(dist.get_rank()) :: len(ranks)]
    found = _together(lambda: {matrix: weights.mark(*matrix) for matrix in own}, ranks, group)
    return {matrix: mark for marks in found for matrix, mark in marks.items()}


def _together(work: Callable[[], Any], ranks: Sequence[int], group: dist.ProcessGroup | None) -> list[Any]:
    """What every rank's ``work`` returns. If it fails on one rank, it fails on all.

    Raises:
        OtherRankError: on the ranks that have no error of their own.
    """
    result: Any = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as problem:
        error = problem
    mine = None if error is None else str(error) or type(error).__name__, result
    told = everyone(mine, group) if len(ranks) > 1 else [mine]
    if error is not None:
        raise error
    for rank, (message, _) in zip(ranks, told):
        if message is not None:
            raise OtherRankError(f"rank {rank} could not go on: {message}")
    return [value for _, value in told]


def _decompose(weight: Tensor, blocks: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Factors of each of the matrices that stand one below another: ``A`` (blocks · r, in) and ``B`` (out, r)."""
    if blocks == 1:
        return low_rank_factors(weight, rank, seed=seed)
    # Thousands of them in a model: at 768 x 2048 a full SVD takes fifteen times as long.
    side = min(weight.shape[0] // blocks, weight.shape[1])
    exact = None if side <= _EXACT_BLOCK_SIDE or rank > side // 4 else False
    pairs = [low_rank_factors(block, rank, seed=seed, exact=exact) for block in weight.chunk(blocks)]
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])


def _seed(matrix: Matrix) -> int:
    """The same for a matrix whatever else is built."""
    return int.from_bytes(hashlib.sha256(matrix_name(*matrix).encode()).digest()[:4], "big")


def _share(factors: tuple[Tensor, Tensor] | None, owner: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Give one matrix's factors to all ranks."""
    box: list[Any] = [None if factors is None else tuple(t.cpu() for t in factors)]
    dist.broadcast_object_list(box, src=owner, group=group)
    assert box[0] is not None
    return box[0]


def write_factors(
    path: Path, factors: FactorSet, fingerprints: Mapping[Matrix, str], *, rank: int, model_id: str
) -> None:
    """Write a factor file atomically."""
    tensors: dict[str, Tensor] = {}
    for matrix, (a, b) in factors.items():
        name = matrix_name(*matrix)
        tensors[f"{name}.a"], tensors[f"{name}.b"] = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    metadata = {
        "format": FORMAT,
        "model": model_id,
        "rank": str(rank),
        "dtype": _name(next(iter(tensors.values())).dtype),
        "fingerprints": json.dumps({matrix_name(*matrix): fingerprints[matrix] for matrix in factors}),
        "sha256": tensors_sha256(tensors),
        "pairs": json.dumps(
            {matrix_name(*matrix): _pair(fingerprints[matrix], *factors[matrix]) for matrix in factors}
        ),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata)
    publish(temporary, path)


def _pair(mark: str, a: Tensor, b: Tensor) -> str:
    """Binds two factors to the matrix of that fingerprint: of equal shapes, those of another would fit as well."""
    return tensors_sha256({f"{mark}.a": a, f"{mark}.b": b})


def read_factors(
    path: Path,
    matrices: Sequence[Matrix],
    fingerprints: Mapping[Matrix, str],
    *,
    rank: int,
    dtype: torch.dtype,
    model_id: str,
) -> FactorSet:
    """Read and verify a factor file; see :func:`load_or_build` for the errors."""
    official = path.is_dir() or path.suffix in (".pt", ".pth")
    tensors, metadata = ({}, {}) if official else read_safetensors(path)
    if official or any(name.endswith((".w1", ".w2")) for name in tensors):
        raise FactorMismatchError(
            f"{path} looks like estimator files of the official SparseLoRA release, which do not say what they were built "
            "from: remove sparse_lora.factors, and the same factors are built from the model, once"
        )
    if metadata.get("format") != FORMAT:
        raise CorruptFileError(f"{path} is not a factor file: its format is {metadata.get('format')!r}, not {FORMAT!r}")
    actual = tensors_sha256(tensors)
    if actual != metadata.get("sha256"):
        raise CorruptFileError(
            f"{path} is damaged: SHA-256 of its tensors is {actual}, expected {metadata.get('sha256')}. Delete it; it "
            "will be built again"
        )
    origin = metadata.get("model")
    for key, have, want in (("rank", metadata.get("rank"), str(rank)), ("dtype", metadata.get("dtype"), _name(dtype))):
        if have != want:
            raise FactorMismatchError(
                f"{path} holds factors of {key} {have} (built from {origin!r}), but this run needs {key} {want}: "
                "remove sparse_lora.factors to build matching ones"
            )
    if "fingerprints" not in metadata:
        raise CorruptFileError(f"{path} is not a whole factor file: its metadata has no 'fingerprints'")
    built_from = json.loads(metadata["fingerprints"])
    pairs = json.loads(metadata.get("pairs", "{}"))  # Files of before have none.
    found: FactorSet = {}
    for matrix in matrices:
        name = matrix_name(*matrix)
        if name not in built_from or f"{name}.a" not in tensors or f"{name}.b" not in tensors:
            raise FactorMismatchError(f"{path} has no factors of {name}: remove sparse_lora.factors to build them")
        if built_from[name] != fingerprints[matrix]:
            raise FactorMismatchError(
                f"{path} was built from another model ({origin!r}): {name} differs from that of {model_id!r}. Remove "
                "sparse_lora.factors to build matching ones"
            )
        found[matrix] = tensors[f"{name}.a"], tensors[f"{name}.b"]
        if pairs and pairs.get(name) != _pair(fingerprints[matrix], *found[matrix]):
            raise CorruptFileError(
                f"{path}: the factors under the name {name} are not those that were built from that matrix. Delete the "
                "file; it will be built again"
            )
    if stray := sorted(tensors.keys() - {f"{name}.{side}" for name in built_from for side in "ab"}):
        raise FactorMismatchError(f"{path}: {stray[0]!r} is no factor: it names no matrix that the file was built from")
    return found


def _check_shapes(path: Path, factors: FactorSet, weights: WeightSource, rank: int, dtype: torch.dtype) -> None:
    """A hash can be made to fit whatever a file holds; the products would fail at the first sparse step."""
    for matrix, pair in factors.items():
        out, length = weights.shape(*matrix)
        blocks = weights.blocks(*matrix)
        kept = min(rank, out // blocks, length)
        for side, tensor, shape in zip("ab", pair, ((blocks * kept, length), (out, kept))):
            if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
                raise FactorMismatchError(
                    f"{path}: {matrix_name(*matrix)}.{side} is {tuple(tensor.shape)} {_name(tensor.dtype)}, but the matrix "
                    f"({out}, {length}) at rank {rank} needs {shape} {_name(dtype)}: remove sparse_lora.factors to build "
                    "matching ones"
                )
            if not is_finite(tensor):
                raise CorruptFileError(f"{path}: {matrix_name(*matrix)}.{side} holds NaN or Inf: delete the file")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
