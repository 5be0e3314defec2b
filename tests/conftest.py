"""Shared by all tests."""

# ruff: noqa: E402
from __future__ import annotations

import atexit
import gc
import os

# It would look through all modules again and again while they are imported; back when the tests are collected.
gc.disable()

# Before anything imports Triton, which reads it once: its kernels run in the interpreter here. And no GPU, here and in
# every process that the tests start, also on a machine that has one: only `make test-gpu` runs on it.
os.environ.update(
    {}
    if os.environ.get("SPARSELORA_TEST_GPU") == "1"
    else {
        "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET", "1"),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
)
# Models here are tiny: with more threads the tests spend their time waiting for each other. An engine gives its process all
# cores where this is not set, for all tests that come after.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from sparselora_dist.process import quiet_bitsandbytes

quiet_bitsandbytes()  # PEFT imports it.

from support import models  # noqa: F401  (sets the factor cache to a folder of this session)

GPU = os.environ.get("SPARSELORA_TEST_GPU") == "1"
SHARED = Path(__file__).resolve().parents[2] / "shared"

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """From here on garbage is collected again, but never looked for in what was imported, which lives as long as this."""
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # Or compiled modules would say at the end that they leak.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test runs where it belongs: on the CPU, or, marked ``gpu``, on the GPU."""
    for item in items:
        if (item.get_closest_marker("gpu") is not None) != GPU:
            reason = "runs on the CPU: make test" if GPU else "needs a GPU: make test-gpu"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from support.workers import ByRanks

    return ByRanks(config, log)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models and data beside the repository; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("real models and data (../shared) are not here")
    return SHARED


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
