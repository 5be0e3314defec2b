"""What the oldest supported versions cannot do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

FSDP2_NF4 = TorchVersion(torch.__version__) >= "2.12"


def can_nf4(engine: str) -> bool:
    return engine != "fsdp2" or FSDP2_NF4


def nf4_case(engine: str, *values: Any, id: str | None = None) -> Any:
    """A case of a parametrised test with NF4 weights under that engine: skipped where the engine cannot hold them."""
    needs = pytest.mark.skipif(not can_nf4(engine), reason="FSDP2 shards NF4's bytes from torch 2.12 on")
    return pytest.param(*values, id=id, marks=needs)
