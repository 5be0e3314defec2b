"""Code that comes with a model is refused by name: never run, never asked about."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparselora_dist.config import ConfigError
from sparselora_dist.io.pretrained import read_config, read_tokenizer
from support.harness import ROOT
from support.models import tiny_config

CODE = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
from transformers import {base}
class Mine({base}):
    model_type = "mine"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder whose config and tokenizer are code of its own, which leaves a file behind when it runs."""
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / "configuration_mine.py").write_text(CODE.format(base="PretrainedConfig"))
    (tmp_path / "tokenization_mine.py").write_text(CODE.format(base="PreTrainedTokenizer"))
    return tmp_path


def change(path: Path, **keys: object) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | keys))


def test_a_config_with_code_is_refused_though_standard_input_says_yes(folder: Path) -> None:
    change(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "configuration_mine.Mine"})
    script = f"""
from sparselora_dist.io.pretrained import read_config, read_tokenizer
for read in (read_config, read_tokenizer):
    try:
        read({str(folder)!r})
    except ValueError as error:
        print(error)
"""
    env = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", script], input="y\n" * 20, capture_output=True, text=True, env=env, timeout=120
    )
    words = f"config.json of {folder} names code of its own ('auto_map': configuration_mine.Mine): it is never run here"
    assert [line.startswith(words) for line in result.stdout.splitlines()] == [True, True], result
    assert "[y/N]" not in result.stdout + result.stderr
    assert not [*folder.rglob("ran")]


def test_also_of_a_family_that_transformers_has(folder: Path) -> None:
    """There Transformers would take its own class; the folder says something else, and is not guessed at."""
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "configuration_mine.Mine"})
    with pytest.raises(ConfigError, match=r"auto_map.*configuration_mine.Mine.*remove 'auto_map'"):
        read_config(str(folder))


def test_a_tokenizer_with_code(folder: Path) -> None:
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_mine.Mine", None]})
    with pytest.raises(
        ConfigError, match=rf"tokenizer_config.json of {folder} names code of its own .*tokenization_mine"
    ):
        read_tokenizer(str(folder))
    assert not [*folder.rglob("ran")]


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_that_names_a_kernel_on_the_hub(folder: Path, key: str) -> None:
    change(folder / "config.json", **{key: "org/kernel:fn"})
    with pytest.raises(ConfigError, match=rf"config.json of {folder} has {key} 'org/kernel:fn'.*sdpa.*never fetched"):
        read_config(str(folder))


def test_a_plain_folder_is_read(folder: Path) -> None:
    assert read_config(str(folder)).model_type == "llama"


def test_every_loading_call_says_no() -> None:
    """Of Transformers' Auto classes, wherever the project calls them."""
    files = [path for room in ("sparselora_dist", "benchmarks", "launch") for path in (ROOT / room).rglob("*.py")]
    calls = 0
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            if not isinstance(owner, ast.Name) or not owner.id.startswith("Auto"):
                continue
            if node.func.attr not in ("from_pretrained", "from_config"):
                continue
            calls += 1
            said = [word.value for word in node.keywords if word.arg == "trust_remote_code"]
            no = len(said) == 1 and isinstance(said[0], ast.Constant) and said[0].value is False
            assert no, f"{path}:{node.lineno}: {owner.id}.{node.func.attr} without trust_remote_code=False"
    assert calls > 5
