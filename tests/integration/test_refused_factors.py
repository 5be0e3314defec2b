"""A factor file that does not fit is refused before any training step, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.models import tiny_base
from support.refusals import says

from .conftest import LAYERS, VOCABULARY, Tiny, byte_tokenizer

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def factors(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The factor file of the tiny model at rank 4, as the cache holds it."""
    from transformers import AutoModelForCausalLM

    from sparselora_dist import SparseLoRAConfig, apply_sparselora

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSELORA_CACHE", str(folder))
        base = AutoModelForCausalLM.from_pretrained(tiny.model, dtype="float32").requires_grad_(False)
        apply_sparselora(base, SparseLoRAConfig(rank=4, layers=LAYERS))
    (path,) = folder.rglob("*.safetensors")
    return path


def test_factors_of_another_rank(refused: Callable, factors: Path) -> None:
    message = refused("--sparse_lora.factors", str(factors), "--sparse_lora.rank", "2")
    says(message, str(factors), "rank 4", "rank 2", "remove sparse_lora.factors")


def test_factors_of_another_model(refused: Callable, factors: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_base(seed=5, vocab_size=VOCABULARY).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    message = refused("--sparse_lora.factors", str(factors), "--model.name_or_path", str(other))
    says(message, str(factors), "another model", str(other), "sparse_lora.factors")


def test_factors_that_lack_a_layer(refused: Callable, factors: Path) -> None:
    message = refused(sparse_lora={"factors": str(factors), "layers": {"ffn": {"0-2": 0.5}}})
    says(message, str(factors), "layers.0.mlp.gate_proj", "remove sparse_lora.factors")


def test_a_truncated_factor_file(refused: Callable, factors: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(factors.read_bytes()[:-100])
    says(refused("--sparse_lora.factors", str(broken)), str(broken), "truncated")
    content = bytearray(factors.read_bytes())
    content[-3] ^= 0x55
    broken.write_bytes(content)
    says(refused("--sparse_lora.factors", str(broken)), str(broken), "damaged", "SHA-256")
    says(refused("--sparse_lora.factors", str(tmp_path / "none.safetensors")), "none.safetensors")
