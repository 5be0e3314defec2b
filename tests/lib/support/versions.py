"""What the oldest supported versions cannot do."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch
from torch.torch_version import TorchVersion

FSDP2_NF4 = TorchVersion(torch.__version__) >= "2.12"
ACCELERATE_FSDP2 = TorchVersion(accelerate.__version__) >= "1.15"
"""Seen with 1.12: FSDP2 resumes without the adapter of a PEFT model, and its own recomputation wraps parts of a layer."""


def can_nf4(engine: str) -> bool:
    return engine != "fsdp2" or FSDP2_NF4


def nf4_case(engine: str, *values: Any, id: str | None = None) -> Any:
    """A case of a parametrised test with NF4 weights under that engine: skipped where the engine cannot hold them."""
    needs = pytest.mark.skipif(not can_nf4(engine), reason="FSDP2 shards NF4's bytes from torch 2.12 on")
    return pytest.param(*values, id=id, marks=needs)
