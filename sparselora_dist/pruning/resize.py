"""The same adapter at other ranks, for the next round of training.

More: B is given columns of zeros and A fresh rows, which change nothing yet. Fewer: the best approximation of s·B·A, its
leading singular vectors; A's rows are then as long as fresh ones, so that an optimizer finds them as a start has them. The
scaling s stays, whatever the rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io.adapter import ADAPTER_FILE
from ..io.adapter_config import CONFIG_FILE, PREFIX
from ..io.manifest import read_safetensors
from ..io.model_folder import save_tensors, write_json
from ..io.shard_files import read_json


def resized(up: Tensor, down: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """B (out, rank) and A (rank, in) after B (out, r) and A (r, in); fp32.

    Args:
        up, down: B and A.
        rank: to be.
        generator: of the fresh rows, drawn as PEFT draws them.
    """
    up, down, had = up.float(), down.float(), down.shape[0]
    if rank >= had:
        bound = 1 / math.sqrt(down.shape[1])
        fresh = torch.empty(rank - had, down.shape[1]).uniform_(-bound, bound, generator=generator)
        return torch.cat([up, up.new_zeros(up.shape[0], rank - had)], 1), torch.cat([down, fresh])
    left, inner = torch.linalg.qr(up.double())
    right, outer = torch.linalg.qr(down.double().t())
    u, sizes, v = torch.linalg.svd(inner @ outer.t())
    # A fresh row's expected length: in · bound² / 3.
    length = math.sqrt(1 / 3)
    up = left @ u[:, :rank] * (sizes[:rank] / length)
    return up.float(), (length * v[:rank] @ right.t()).float()


def patterns(layers: Mapping[str, int], lora: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``rank_pattern`` and ``alpha_pattern`` that give every adapter of a layer its rank, at the scaling of ``lora``.

    Args:
        layers: rank by the layer's path, such as ``model.layers.3``.
        lora: with ``r``, ``lora_alpha`` and ``use_rslora``.
    """

    def scale(rank: int) -> float:
        return math.sqrt(rank) if lora.get("use_rslora") else rank

    factor = lora["lora_alpha"] / scale(lora["r"])
    names = {path: path.replace(".", r"\.") + r"\..*" for path in layers}
    return {
        "rank_pattern": {names[path]: rank for path, rank in layers.items()},
        "alpha_pattern": {names[path]: factor * scale(rank) for path, rank in layers.items()},
    }


def resize_adapter(source: Path, target: Path, layers: Mapping[str, int], seed: int) -> None:
    """Write the adapter of ``source`` to ``target``, its ranks those of ``layers``.

    Args:
        source: a folder that PEFT wrote.
        target: made.
        layers: rank by the layer's path; adapters outside these layers stay as they are.
        seed: of the fresh rows.
    """
    config = read_json(source / CONFIG_FILE)
    tensors, _ = read_safetensors(source / ADAPTER_FILE)
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        layer = next((path for path in layers if module.startswith(f"{path}.")), None)
        if layer is None:
            continue
        other = key.replace(".lora_A.", ".lora_B.")
        up, down = resized(tensors[other], tensors[key], layers[layer], _generator(seed, module))
        tensors[other], tensors[key] = up.contiguous(), down.contiguous()
    target.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, target / ADAPTER_FILE)
    write_json(config | patterns(layers, config), target / CONFIG_FILE)


def _generator(seed: int, module: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {module}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
