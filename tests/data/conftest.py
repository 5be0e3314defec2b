"""Tokenizers made on the spot, small enough that expected ids can be written down, and the real data where it lies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SHARED = Path(__file__).resolve().parents[2].parent / "shared"


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """One id per byte, 8 special tokens, and any `merges` of two characters on top."""

    def make(template: str | None = None, merges: tuple[tuple[str, str], ...] = (), specials: bool = True) -> Any:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = [*alphabet, *(left + right for left, right in merges)]
        backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, list(merges)))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        named = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"} if specials else {}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>", "<end>"],
            **named,
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer()


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write rows (objects, or raw text lines) to a file and return its path."""

    def write(*rows: object, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def real_tokenizer() -> Any:
    path = SHARED / "models" / "base-9m"
    if not (path / "tokenizer.json").is_file():
        pytest.skip(f"no real tokenizer at {path}")
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    def find(name: str) -> Path:
        path = SHARED / "data" / name
        if not path.is_file():
            pytest.skip(f"no real data at {path}")
        return path

    return find
