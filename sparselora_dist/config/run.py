"""One file is the whole run: its sections, read and checked before anything heavy is imported or loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from .engine import EngineSection
from .files import load_file
from .lora import LoraSection
from .parse import (
    ConfigError,
    apply_overrides,
    check_fields,
    dump_dataclass,
    field_keys,
    parse_dataclass,
    refuse_code,
    require,
    unknown_key,
)
from .quantization import QuantizationSection
from .sparse import SparseLoRAConfig
from .train import TrainSection

__all__ = ["DataSection", "ModelSection", "RunConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """The base model."""

    PATH: ClassVar[str] = "model"

    name_or_path: str
    """A folder in Hugging Face format, or the id of a model on the Hub."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the frozen weights and the compute."""

    attn_implementation: str | None = "sdpa"
    """Transformers' name of an attention implementation; None is its own choice."""

    def __post_init__(self) -> None:
        check_fields(self, self.PATH)
        name, at = self.name_or_path, f"{self.PATH}.name_or_path"
        require(bool(name.strip()), at, name, 'the path of a model folder, or a model id such as "org/name"')
        parts = name.replace("\\", "/").split("/")
        require(
            ".." not in parts or os.path.exists(name),
            at,
            name,
            "a model id, which never contains '..', or the path of a folder that exists (this one does not)",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """What is trained on and evaluated on. The row format is detected."""

    PATH: ClassVar[str] = "data"

    train: str
    """A JSONL file, a folder saved by ``datasets``, or the id of a data set on the Hub."""

    eval: str | None = None
    """The same for evaluation; None evaluates nothing."""

    max_length: int = 1024
    """Tokens per sequence; longer ones are cut."""

    packing: bool | None = None
    """Rows of a step one after another, without padding, each seen by itself alone; null: where the attention can."""

    train_limit: int | None = None
    """Use the first rows only."""

    eval_limit: int | None = None
    """The same for evaluation."""

    def __post_init__(self) -> None:
        check_fields(self, self.PATH)
        require(bool(self.train), f"{self.PATH}.train", self.train, "a JSONL file, a folder, or a data set's id")
        require(self.eval != "", f"{self.PATH}.eval", self.eval, "a JSONL file, a folder, a data set's id, or null")
        require(self.max_length >= 2, f"{self.PATH}.max_length", self.max_length, "integers from 2")
        for name in ("train_limit", "eval_limit"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{self.PATH}.{name}", value, "integers from 1, or null")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """All sections of a run. ``sparse_lora`` left out is a plain LoRA run; ``engine`` left out is one process."""

    model: ModelSection
    """The base model."""

    data: DataSection
    """Training and evaluation data."""

    train: TrainSection
    """Length, optimizer, batches, output."""

    lora: LoraSection = field(default_factory=LoraSection)
    """The adapter, in PEFT's names."""

    sparse_lora: SparseLoRAConfig = field(default_factory=lambda: SparseLoRAConfig(enabled=False))
    """What is left out of the frozen matrices."""

    quantization: QuantizationSection = field(default_factory=QuantizationSection)
    """How the frozen matrices are stored."""

    engine: EngineSection = field(default_factory=lambda: EngineSection(name="single"))
    """Who holds the shards."""

    comment: str | None = field(default=None, metadata={"key": "_comment"})
    """A note for readers of the file, under the key ``_comment``; nothing reads it."""

    def __post_init__(self) -> None:
        check_fields(self, "")
        sparse = self.sparse_lora
        if sparse.enabled and not any(sparse.layers.values()):
            raise ConfigError(
                "'sparse_lora.enabled' is true, but 'sparse_lora.layers' is empty, so that nothing would be sparse: "
                'name layers, such as {"ffn": {"3-30": 0.99}}, or set \'sparse_lora.enabled\' to false'
            )

        compute = self.quantization.bnb_4bit_compute_dtype
        if self.quantization.load_in_4bit and compute not in (None, self.model.dtype):
            raise ConfigError(
                f"'quantization.bnb_4bit_compute_dtype' is \"{compute}\", but 'model.dtype' is \"{self.model.dtype}\": the "
                "products are computed in the model's dtype. Make them equal, or leave the first out"
            )
        zero = self.engine.deepspeed_config().get("zero_optimization", {})
        if self.quantization.load_in_4bit and zero.get("zero_quantized_weights"):
            raise ConfigError(
                "'engine.deepspeed.zero_optimization.zero_quantized_weights' with 'quantization.load_in_4bit': it would "
                "quantise the 4-bit codes again, as if they were weights. Remove it"
            )

        can_pack = self.model.attn_implementation != "eager"
        if self.data.packing and not can_pack:
            raise ConfigError(
                "'data.packing' is true, but 'model.attn_implementation' is \"eager\", which computes all pairs of tokens "
                'of a line: use "sdpa", "flex_attention" or "flash_attention_2", or set \'data.packing\' to false'
            )
        budget = self.train.max_tokens_per_micro_batch
        if budget is not None and self.packing and budget < self.data.max_length:
            raise ConfigError(
                f"'train.max_tokens_per_micro_batch' is {budget}, but a row may have 'data.max_length' "
                f"{self.data.max_length} tokens: allowed: integers from {self.data.max_length}, or null"
            )

    @property
    def packing(self) -> bool:
        """Whether micro-batches are packed: as ``data.packing`` says, by default where the attention can."""
        chosen = self.data.packing
        return self.model.attn_implementation != "eager" if chosen is None else chosen

    @property
    def token_budget(self) -> int:
        """Tokens a rank and packed micro-batch: as many as padding could take where nothing is said."""
        most = self.train.per_device_train_batch_size * self.data.max_length
        return self.train.max_tokens_per_micro_batch or most

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunConfig:
        """From the object that a run file holds."""
        refuse_code(data)
        for key in data if isinstance(data, dict) else ():
            if key not in field_keys(cls):
                raise _misplaced(str(key)) or unknown_key("", key, field_keys(cls))
        return parse_dataclass(cls, data, "")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
        """From a JSON (or YAML) file, with ``--section.key value`` words on top."""
        return cls.from_dict(apply_overrides(load_file(path), overrides))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data that ``from_dict`` reads back to an equal config, defaults written out."""
        return dump_dataclass(self)


def _misplaced(key: str) -> ConfigError | None:
    """A section's key at the top of the file: say which section it belongs to."""
    sections = (ModelSection, DataSection, TrainSection, SparseLoRAConfig, QuantizationSection, EngineSection)
    homes = [f"'{section.PATH}.{key}'" for section in sections if key in field_keys(section)]
    if not homes:
        return None
    return ConfigError(f"unknown key '{key}' outside the sections: did you mean {' or '.join(homes)}?")
