"""Free memory is what a process can have: inside its container, and of its share of the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparselora_dist.io import memory

CPU = torch.device("cpu")
GB = 10**9


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("", (), {"available": 100 * GB}))
    return tmp_path


def limit(folder: Path, most: str, current: int, inactive: int, active: int) -> None:
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\nactive_file {active}\n")


def test_a_containers_limit_counts_and_its_file_cache_is_free(container: Path) -> None:
    assert memory.free_bytes(CPU, 1) == 100 * GB
    limit(container, str(16 * GB), 15 * GB, inactive=9 * GB, active=2 * GB)
    assert memory.free_bytes(CPU, 1) == 12 * GB
    assert memory.free_bytes(CPU, 4) == 3 * GB
    limit(container, "max", 15 * GB, inactive=0, active=0)
    assert memory.free_bytes(CPU, 2) == 50 * GB


def test_too_little_says_how_much_and_what_to_do(container: Path) -> None:
    memory.check_fits(100 * GB, CPU, 1, rank=0)
    with pytest.raises(
        memory.InsufficientMemoryError, match=r"rank 3 would keep 120\.00 GB.*100\.00 GB are free.*load_in_4bit"
    ):
        memory.check_fits(120 * GB, CPU, 1, rank=3)


def test_peak_is_of_this_process() -> None:
    host, device = memory.peak_bytes(CPU)
    assert 10**7 < host < 10**11 and device == 0
