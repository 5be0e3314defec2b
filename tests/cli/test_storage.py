"""``inspect --storage``: formats and bits of a model folder's weights, from headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparselora_dist.cli import main
from sparselora_dist.io.merge import merge_adapter
from sparselora_dist.io.shard_files import TensorFiles
from support.merging import BLOCKS, make_adapter, save_base, tensors


def storage(*words: Any) -> int:
    return main(["inspect", *map(str, words), "--storage"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model in fp32, and the same with an adapter in NF4 as bitsandbytes' files hold it."""
    folder = tmp_path_factory.mktemp("storage")
    save_base(folder / "base", shard="60KB", **BLOCKS)
    make_adapter(folder / "adapter", folder / "base")
    merge_adapter(folder / "base", folder / "adapter", folder / "nf4", save_in_4bit=True)
    return folder


def test_bytes_and_values_are_those_of_the_files(folders: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("base", "nf4"):
        assert storage(folders / name, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        held = tensors(folders / name)
        assert sum(one["bytes"] for one in found["storages"]) == sum(tensor.nbytes for tensor in held.values())
        values = sum(tensor.numel() for tensor in tensors(folders / "base").values())
        assert sum(one["values"] for one in found["storages"]) == values
        by_name = {one["name"]: one for one in found["storages"]}
        if name == "base":
            assert found["quantization_config"] is None and set(by_name) == {"fp32"}
            assert by_name["fp32"]["bits"] == 32 and by_name["fp32"]["tensors"] == len(
                TensorFiles.of_model(folders / name).tensors
            )
        else:
            assert set(by_name) == {"bitsandbytes", "bf16"} and by_name["bitsandbytes"]["tensors"] == 21
            assert by_name["bitsandbytes"]["bits"] > 4.1 and by_name["bf16"]["bits"] == 16


def test_what_is_printed_and_refused(folders: Path, capsys: pytest.CaptureFixture) -> None:
    assert storage(folders / "nf4") == 0
    printed = capsys.readouterr().out
    assert "quantization_config: quant_method bitsandbytes, load_in_4bit True, bnb_4bit_quant_type nf4" in printed
    assert printed.splitlines()[1].split() == ["storage", "tensors", "values", "GB", "bits"]
    for words, says in (
        (["--data", "x"], "'--data' has no meaning with --storage"),
        (["--sparsity"], "'--storage' and '--sparsity' are two questions"),
    ):
        assert storage(folders / "nf4", *words) == 2
        assert says in capsys.readouterr().err
