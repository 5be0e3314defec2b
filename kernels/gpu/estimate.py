"""How long our form of a product takes on a device, by its tiles and the device's rates: no launch, only arithmetic."""

from __future__ import annotations

from functools import lru_cache

import torch

from .gated_ffn import FORWARD_TILES
from .gated_gradient import GRADIENT_TILES
from .indexed_linear import NN_TILES, NT_TILES
from .tiling import kind_of, predict

_TABLES = {"nt": NT_TILES, "nn": NN_TILES, "gated": FORWARD_TILES, "gradient": GRADIENT_TILES}


@lru_cache(4096)  # Layers ask for the same again and again.
def product_seconds(
    product: str, n: int, k: int, length: int, dtype: torch.dtype, *, nf4: bool, device: torch.device
) -> float:
    """Seconds of the programs of a product (``rates.PRODUCTS``) of n tokens, k channels and the other side ``length``.

    Few programs, or tiles that hang over the edge, leave matrix units idle: 512 tokens by 32 channels take as long as by
    128.
    """
    kind = kind_of(dtype, nf4=nf4, ragged=k % 16 > 0)
    # The sum runs over the input in forward products, over channels in those that give a row.
    width, summed = (k, length) if product in ("nt", "gated") else (length, k)
    return predict(_TABLES[product], kind, product, n, width, summed, device)
