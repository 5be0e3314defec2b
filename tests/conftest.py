"""Shared by all tests."""

from __future__ import annotations

import os

# Before anything imports Triton, which reads it once: its kernels run in the interpreter here.
os.environ.setdefault("TRITON_INTERPRET", "1")

import warnings
from pathlib import Path

import pytest
import torch

from support import models  # noqa: F401  (sets the factor cache to a folder of this session)

SHARED = Path(__file__).resolve().parents[2] / "shared"

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Models here are tiny: with more threads the tests spend their time waiting for each other.
torch.set_num_threads(1)
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models and data beside the repository; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("real models and data (../shared) are not here")
    return SHARED


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
