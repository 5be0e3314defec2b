"""Streaming on several ranks: quantised files, modules that PEFT copies, offloading; and one rank's failure ends all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from support.harness import run_ranks
from support.merging import load, logits, save_base
from support.nf4_workers import SHAPE
from support.versions import nf4_case

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("bases")
    save_base(root / "plain", shard="60KB", **SHAPE)
    save_base(root / "tied", tie_word_embeddings=True, **SHAPE)
    for double in (True, False):
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            llm_int8_skip_modules=["lm_head", "model.layers.2.mlp.up_proj"],
        )
        model = AutoModelForCausalLM.from_pretrained(
            root / "plain", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
        )
        model.save_pretrained(root / ("prequantized" if double else "prequantized single"))
    broken = load(root / "plain")
    broken.model.layers[1].self_attn.q_proj.weight.data[-1, 3] = float("nan")
    broken.save_pretrained(root / "nan", max_shard_size="60KB")
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def single(folders: dict[str, str], out: Path) -> Results:
    return run_ranks("support.load_workers:run", 1, "single", folders, str(out))


@pytest.fixture(scope="module", params=[nf4_case(name, name) for name in ("zero3", "fsdp2")])
def sharded(request: pytest.FixtureRequest, folders: dict[str, str], out: Path) -> tuple[str, Results]:
    return request.param, run_ranks("support.load_workers:run", 2, request.param, folders, str(out))


@pytest.mark.parametrize("which", ["prequantized", "prequantized single"])
def test_prequantized_bytes_are_one_process_bytes(sharded: Any, single: Results, which: str) -> None:
    expected = single[0][which]
    assert len(expected) == 21 * 2 - 1  # One matrix is plain.
    for rank in sharded[1]:
        assert rank[which].keys() == expected.keys()
        for name, part in expected.items():
            assert torch.equal(rank[which][name], part), name


@pytest.mark.parametrize("which", ["plain", "tied"])
def test_what_peft_copies_trains_and_is_saved(
    sharded: Any, single: Results, folders: dict[str, str], out: Path, which: str
) -> None:
    engine_name, ranks = sharded
    reference = single[0][which]
    for rank in ranks:
        got = rank[which]
        for step, (loss, norm) in enumerate(reference["steps"]):
            assert got["steps"][step] == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4))
        assert got["parameters"].keys() == reference["parameters"].keys()
        kinds = {
            kind for kind in ("lm_head", "lora_embedding_A", "lora_B") for name in got["parameters"] if kind in name
        }
        assert kinds == {"lm_head", "lora_embedding_A", "lora_B"}
        for parameter, value in reference["parameters"].items():
            torch.testing.assert_close(got["parameters"][parameter], value, rtol=1e-4, atol=1e-5, msg=parameter)
    one, two = (
        logits(PeftModel.from_pretrained(load(Path(folders[which])), out / f"{engine}-{which}").eval())
        for engine in ("single", engine_name)
    )
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(two, logits(load(Path(folders[which]))), atol=1e-2)


def test_offloaded_weights_live_on_the_host_and_train(sharded: Any, single: Results) -> None:
    for rank in sharded[1]:
        got = rank["offload"]
        assert got["home"] == torch.device("cpu") and got["where"] == {"cpu"}
        for (loss, norm), (own_loss, own_norm) in zip(single[0]["offload"]["steps"], got["steps"]):
            assert own_loss == pytest.approx(loss, rel=1e-5) and own_norm == pytest.approx(norm, rel=1e-4)


SAID = {
    "nan": ("CorruptFileError", "model.layers.1.self_attn.q_proj.weight", "NaN or Inf"),
    "nan single": ("CorruptFileError", "model.layers.1.self_attn.q_proj.weight", "NaN or Inf"),
    "read": ("CorruptFileError", "model.layers.1.self_attn.o_proj.weight"),
    "read single": ("CorruptFileError", "model.layers.1.self_attn.o_proj.weight"),
    "read plain": ("CorruptFileError", "model.layers.1.self_attn.o_proj.weight"),
    "read norm": ("CorruptFileError", "model.norm.weight"),
    "read prequantized": ("CorruptFileError", "model.layers.1.self_attn.q_proj.weight.absmax"),
    "memory": ("InsufficientMemoryError", "more ranks"),
    "file": ("FileNotFoundError", "gone"),
}


@pytest.mark.parametrize("case", SAID)
def test_one_ranks_failure_ends_all(sharded: Any, single: Results, case: str) -> None:
    """It says what is wrong, and so do those that waited for it."""
    kind, *parts = SAID[case]
    healthy, failed = (rank["errors"][case] for rank in sharded[1])
    for message in (failed, single[0]["errors"][case]):
        assert message.startswith(f"{kind}: ") and all(part in message for part in parts), message
    assert healthy.startswith("OtherRankError: rank 1 could not go on: "), healthy
    assert all(part in healthy for part in parts), healthy
