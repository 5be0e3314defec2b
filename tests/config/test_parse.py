"""Files, dataclasses, overrides: what is accepted, and that each refusal names key, value and remedy."""

import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import field
from typing import Any, Literal

import pytest

from sparselora_dist.config import ConfigError, apply_overrides
from sparselora_dist.config.errors import nearest
from sparselora_dist.config.files import load_file, parse_json, parse_yaml
from sparselora_dist.config.model import Section, section
from sparselora_dist.config.model import parse as parse_section


@section
class Inner(Section):
    size: int
    mode: Literal["fast", "slow", 3] = "fast"


@section
class Outer(Section):
    inner: Inner
    ratio: float = 0.5
    step: float | int | None = None
    flag: bool = False
    text: str | None = None
    names: list[str] = field(default_factory=list)
    table: dict[str, dict[str, float]] = field(default_factory=dict)
    anything: dict[str, Any] = field(default_factory=dict)
    resume: bool | str = False


def parse(**data: Any) -> Outer:
    return parse_section(Outer, {"inner": {"size": 1}, **data}, "top")


def refused(*words: str) -> Any:
    """A ConfigError, which is a ValueError, whose message has all the words."""
    return pytest.raises(ConfigError, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words))


def test_types_are_followed() -> None:
    got = parse(ratio=1, step=3, names=["a"], table={"x": {"1-2": 1}}, anything={"a": [1, {"b": None}]}, resume="last")
    assert got.ratio == 1.0 and type(got.ratio) is float
    assert got.step == 3 and type(got.step) is int
    assert type(parse(step=0.25).step) is float and parse(step=None).step is None
    assert got.table == {"x": {"1-2": 1.0}} and got.anything == {"a": [1, {"b": None}]}
    assert got.resume == "last" and parse(resume=True).resume is True
    assert parse(inner={"size": 2, "mode": 3}).inner == Inner(size=2, mode=3)
    assert parse(table={"x": {5: 0.5}}).table == {"x": {"5": 0.5}}  # YAML reads a lone 5 as a number


def test_the_result_shares_nothing_with_its_data() -> None:
    data: dict[str, Any] = {"inner": {"size": 1}, "anything": {"a": [1]}}
    got = parse_section(Outer, data, "")
    data["anything"]["a"].append(2)
    assert got.anything == {"a": [1]}
    plain = got.to_dict()
    assert parse_section(Outer, json.loads(json.dumps(plain)), "") == got
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.flag = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"inner": {"size": True}}, ["'top.inner.size'", "true", "an integer"]),
        ({"inner": {"size": 1.0}}, ["'top.inner.size'", "1.0", "an integer", "write 1"]),
        ({"inner": {"size": "4"}}, ["'top.inner.size'", '"4"', "an integer", "write 4, without quotes"]),
        ({"inner": {"size": None}}, ["'top.inner.size'", "null", "an integer"]),
        ({"inner": {"size": 1, "mode": "fsat"}}, ["'top.inner.mode'", '"fsat"', '"fast", "slow", 3', 'mean "fast"']),
        ({"inner": {"size": 1, "mode": True}}, ["'top.inner.mode'", "true"]),
        ({"inner": {"siez": 1}}, ["unknown key 'top.inner.siez'", "did you mean 'size'?", "known: mode, size"]),
        ({"inner": {}}, ["missing key 'top.inner.size'", "an integer"]),
        ({"inner": [1]}, ["'top.inner'", "[1]", "an object"]),
        ({"ratio": "1e-3"}, ["'top.ratio'", '"1e-3"', "a number", "write 0.001, without quotes"]),
        ({"ratio": False}, ["'top.ratio'", "false", "a number"]),
        ({"ratio": float("nan")}, ["'top.ratio'", "NaN", "finite numbers"]),
        ({"step": "half"}, ["'top.step'", '"half"', "a number or an integer or null"]),
        ({"flag": "True"}, ["'top.flag'", '"True"', "true or false", "write true, without quotes"]),
        ({"flag": 1}, ["'top.flag'", "1", "true or false"]),
        ({"text": 2024}, ["'top.text'", "2024", "a string or null", "put it in quotes"]),
        ({"names": ["a", 1]}, ["'top.names[1]'", "1", "a string"]),
        ({"names": "a"}, ["'top.names'", '"a"', "a list"]),
        ({"table": {"x": {"1-2": "s"}}}, ["'top.table.x.1-2'", '"s"', "a number"]),
        ({"table": {True: {}}}, ["'top.table'", "true", "keys are strings"]),
        ({"anything": {"a": [float("inf")]}}, ["'top.anything.a[0]'", "Infinity", "finite"]),
        ({"resume": None}, ["'top.resume'", "null", "true or false or a string"]),
        ({3: 1}, ["unknown key 'top.3'"]),
    ],
)
def test_refusals_name_key_value_and_remedy(data: dict[str, Any], words: list[str]) -> None:
    with refused(*words):
        parse(**data) if all(isinstance(key, str) for key in data) else parse_section(Outer, data, "top")


def test_a_missing_section_names_the_key_it_needs() -> None:
    with refused("missing key 'inner.size'"):
        parse_section(Outer, {}, "")
    with refused("'the config'", "[]", "an object"):
        parse_section(Outer, [], "")  # type: ignore[arg-type]


def test_nearest() -> None:
    known = ["learning_rate", "max_steps", "rank"]
    assert [nearest(key, known) for key in ("rnak", "LearningRate", "max-steps", "steps", "zzz")] == [
        "rank",
        "learning_rate",
        "max_steps",
        "max_steps",
        None,
    ]


# Overrides


def test_overrides_are_json_or_strings() -> None:
    data = {"train": {"seed": 1, "keep": 2}, "sparse_lora": {"layers": {"ffn": {"3-30": 0.99}}}}
    words = ["--train.seed", "7", "--train.lr=1e-3", "--train.resume", "true", "--train.eval_steps", "null"]
    words += ["--train.name", "run-1"]
    words += ["--lora.target_modules", '["q_proj"]', "--sparse_lora.layers.ffn", '{"1-7":0.9}', "--train.shift", "-0.5"]
    words += ["--engine.deepspeed.zero_optimization.stage", "3", "--train.text=a=b", "--train.quoted", '"12"']
    assert apply_overrides(data, words) == {
        "train": {
            "seed": 7,
            "keep": 2,
            "lr": 0.001,
            "resume": True,
            "eval_steps": None,
            "name": "run-1",
            "shift": -0.5,
            "text": "a=b",
            "quoted": "12",
        },
        "sparse_lora": {"layers": {"ffn": {"1-7": 0.9}}},
        "lora": {"target_modules": ["q_proj"]},
        "engine": {"deepspeed": {"zero_optimization": {"stage": 3}}},
    }
    assert data["train"] == {"seed": 1, "keep": 2}  # the argument is left as it was
    assert apply_overrides(data, ["--a.b", "1", "--a.b", "2"])["a"] == {"b": 2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.seed", "7"], ['"train.seed"', "--section.key value"]),
        (["-x.y", "7"], ['"-x.y"', "--section.key value"]),
        (["--seed", "7"], ["'--seed'", "names no key of a section", "--section.key value"]),
        (["--local_rank=0"], ["'--local_rank'", "names no key of a section"]),
        (["--train..seed", "7"], ["'--train..seed'", "--section.key value"]),
        (["--train."], ["'--train.'"]),
        (["--"], ["'--'"]),
        (["--train.seed"], ["'--train.seed'", "no value", "--train.seed=value"]),
        (["--train.seed", "--train.lr", "1"], ["'--train.seed'", "no value"]),
        (["--train.seed", "1", "2"], ['"2"', "--section.key value"]),
        (["--train.lr", "NaN"], ["'--train.lr'", "NaN", "finite"]),
        (["--train.lr", "1e999"], ["'--train.lr'", "1e999", "finite"]),
        (["--a.b", '{"x": 1'], ["'--a.b'", "line 1, column 8", "not JSON"]),
        (["--a.b", '{"x": 1, "x": 2}'], ["'--a.b'", "'x' is given twice"]),
        (["--a.b", "[NaN]"], ["'--a.b'", "NaN", "finite"]),
        (["--engine.deepspeed.bf16.enabled", "true"], ["'engine.deepspeed'", '"ds.json"', "no keys"]),
    ],
)
def test_malformed_overrides_are_refused(words: list[str], said: list[str]) -> None:
    with refused(*said):
        apply_overrides({"engine": {"deepspeed": "ds.json"}}, words)


# Files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1,\n  "b": }', ["line 2, column 8", "not JSON"]),
        ("", ["line 1, column 1"]),
        ('{"a": {"b": 1},\n "c": 2, "a": 3}', ["line 2, column 10", "'a' is given twice", "keep one"]),
        ('{"x": [{"b": "b"}, {"b": 1, "\\u0062": 2}]}', ["'b' is given twice"]),
        ('{"a": "NaN",\n"b": NaN}', ["line 2, column 6", "NaN is refused", "finite"]),
        ('{"a": -Infinity}', ["line 1, column 7", "-Infinity"]),
        ('{"a": 1e999}', ["line 1, column 7", "1e999", "finite"]),
        ("[" * 100000, ["not JSON"]),
        ("[1]", ["[1]", "an object"]),
    ],
)
def test_json_errors_have_a_place(tmp_path: Any, text: str, words: list[str]) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with refused(str(path), *words):
        load_file(path)


def test_json_that_only_looks_wrong() -> None:
    text = '{"a": "}{[:\\"NaN", "b": {"a": 1e3, "c": -0.5E-2}, "NaN": [], "k:": {}}'
    assert parse_json(text, "x") == json.loads(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", ["line 3, column 1", "'a' is given twice"]),
        ("x:\n  - {b: 1, b: 2}\n", ["line 2, column 12", "'b' is given twice"]),
        ("a: [1\nb: 2", ["line 2", "not plain YAML"]),
        ("a: !!python/object/apply:os.system ['true']", ["line 1", "not plain YAML", "python/object/apply:os.system"]),
        ("a: !!python/name:os.system", ["not plain YAML"]),
        ("- 1", ["an object"]),
        ("a: 2024-13-45", ["not YAML that can be read"]),
    ],
)
def test_yaml_is_safe_and_strict(tmp_path: Any, text: str, words: list[str]) -> None:
    path = tmp_path / "sparse.yml"
    path.write_text(text)
    with refused(str(path), *words):
        load_file(path)


def test_yaml_anchors_still_work() -> None:
    assert parse_yaml("a: &x {k: [1]}\nb: *x\nc: *x\n", "x")["c"] == {"k": [1]}


def test_unreadable_files(tmp_path: Any) -> None:
    with refused("gone.json", "cannot be read", "No such file"):
        load_file(tmp_path / "gone.json")
    with refused("run.toml", ".json, .yaml or .yml"):
        load_file(tmp_path / "run.toml")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with refused("latin.json", "not UTF-8", "byte 7"):
        load_file(tmp_path / "latin.json")
    (tmp_path / "bom.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert load_file(tmp_path / "bom.json") == {"a": 1}


def test_the_package_imports_nothing_heavy(tmp_path: Any) -> None:
    # peft brings torch; neither may be loaded to read a sparse_lora section.
    # The package above is stood in for: what it imports is not what this test is about.
    code = (
        "import importlib.util as u, sys, types; top = types.ModuleType('sparselora_dist');"
        "top.__path__ = u.find_spec('sparselora_dist').submodule_search_locations; sys.modules[top.__name__] = top;"
        "import sparselora_dist.config as c; c.SparseLoRAConfig.from_dict({'layers': {'ffn': {'1': 0.5}}});"
        "print([m for m in ('torch', 'deepspeed', 'peft', 'transformers', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"
