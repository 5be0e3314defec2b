"""The ``quantization`` section: bitsandbytes' names, its defaults, and what is refused with a reason."""

from typing import Any

import pytest

from sparselora_dist.codecs import NF4Codec, PlainCodec
from sparselora_dist.config import ConfigError, ModelSection, RunConfig
from sparselora_dist.io.load import frozen_codec

MODEL = ModelSection(name_or_path="org/model")


def run(model: dict[str, Any] | None = None, **quantization: Any) -> RunConfig:
    return RunConfig.from_dict(
        {
            "model": {"name_or_path": "org/model", **(model or {})},
            "data": {"train": "train.jsonl"},
            "train": {"output_dir": "runs/x"},
            "quantization": quantization,
        }
    )


def test_defaults() -> None:
    section = run().quantization
    assert not section.load_in_4bit and isinstance(frozen_codec(MODEL, section), PlainCodec)
    section = run(load_in_4bit=True).quantization
    assert (section.bnb_4bit_quant_type, section.bnb_4bit_use_double_quant) == ("nf4", True)
    assert (section.bnb_4bit_compute_dtype, section.bnb_4bit_quant_storage) == (None, "uint8")
    assert frozen_codec(MODEL, section) == NF4Codec(double_quant=True)


def test_every_key_and_back() -> None:
    keys = {
        "format": None,
        "bits": None,
        "fp8_compute": True,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }
    config = run(**keys)
    assert frozen_codec(MODEL, config.quantization) == NF4Codec(double_quant=False)
    assert config.to_dict()["quantization"] == keys
    assert RunConfig.from_dict(config.to_dict()) == config
    assert config.quantization.__slots__ == tuple(keys)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("load_in_8bit", True, "use 'load_in_4bit'"),
        ("llm_int8_skip_modules", ["lm_head"], "the embedding and the LM head never are"),
        ("load_in_4bits", True, "did you mean 'load_in_4bit'"),
        ("bnb_4bit_use_double_quants", True, "did you mean 'bnb_4bit_use_double_quant'"),
        ("bnb_4bit_quant_type", "fp4", '"nf4"'),
        ("bnb_4bit_quant_storage", "bfloat16", 'only "uint8" is offered'),
        ("bnb_4bit_compute_dtype", "float16", '"bfloat16"'),
        ("load_in_4bit", "yes", "true"),
    ],
)
def test_refusals_name_key_and_remedy(key: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(**{key: value})
    assert f"quantization.{key}" in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize(("dtype", "compute"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_compute_dtype_that_is_not_the_models(dtype: str, compute: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run({"dtype": dtype}, load_in_4bit=True, bnb_4bit_compute_dtype=compute)
    for part in ("quantization.bnb_4bit_compute_dtype", "model.dtype", dtype, compute):
        assert part in str(caught.value)
    run({"dtype": dtype}, load_in_4bit=True, bnb_4bit_compute_dtype=dtype)


FORMATS = [
    ({"format": "bcq"}, "bcq", 4, "bcq4"),
    ({"format": "shiftadd"}, "shiftadd", 3, "shiftadd3"),
    ({"format": "hqq", "bits": 2}, "hqq", 2, "hqq2"),
    ({"format": "fp8"}, "fp8", 8, "fp8"),
    ({"format": "billm", "bits": 2}, "billm", 2, "billm"),
    ({"format": "nf4"}, "nf4", 4, "nf4"),
    ({"load_in_4bit": True, "format": "nf4"}, "nf4", 4, "nf4"),
    ({}, None, None, None),
]


@pytest.mark.parametrize(("said", "stored", "width", "label"), FORMATS)
def test_a_format_and_its_bits(said: dict[str, Any], stored: str | None, width: int | None, label: str | None) -> None:
    section = run(**said).quantization
    assert (section.stored, section.label) == (stored, label)
    assert stored is None or section.width == width


def test_storages_that_are_one_are_said_to_be() -> None:
    nf4, plain = run(load_in_4bit=True).quantization.identity, run().quantization.identity
    assert run(format="nf4", bits=4).quantization.identity == nf4 != plain
    assert run(format="bcq").quantization.identity == run(format="bcq", bits=4).quantization.identity
    told = [run(**said).quantization.identity for said in ({"format": "bcq", "bits": 3}, {"format": "hqq", "bits": 3})]
    told += [run(format="fp8", fp8_compute=computes).quantization.identity for computes in (True, False)]
    assert all(told.count(one) == 1 for one in [*told, nf4, plain] if one in told)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"bits": 3}, "'quantization.bits' is 3, but no 'quantization.format' is given: name one"),
        ({"format": "bcq", "bits": 8}, "'quantization.bits' is 8, but bcq has 2, 3, 4"),
        ({"format": "fp8", "bits": 4}, "'quantization.bits' is 4, but fp8 has 8"),
        ({"format": "hqq", "load_in_4bit": True}, "'quantization.load_in_4bit' is true, which is nf4, but .* \"hqq\""),
        ({"format": "gptq"}, '\'quantization.format\' is "gptq": expected one of .*"bcq"'),
        ({"format": "bcq", "bits": 5}, "'quantization.bits' is 5: expected one of 2, 3, 4, 8"),
    ],
)
def test_formats_that_contradict_are_refused(said: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(**said)


def test_weights_are_not_streamed_from_nvme() -> None:
    config = run().to_dict()
    offload = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}
    config["engine"] = {"name": "zero3", "deepspeed": {"zero_optimization": offload}}
    with pytest.raises(ConfigError, match=r"engine\.deepspeed\.zero_optimization\.offload_param\.device' is \"nvme\""):
        RunConfig.from_dict(config)
    offload["offload_param"] = {"device": "cpu"}
    RunConfig.from_dict(config)
