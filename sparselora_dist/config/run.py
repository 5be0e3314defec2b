"""One file is the whole run: its sections, read and checked before anything heavy is imported or loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge
from pydantic import BeforeValidator, Field, WithJsonSchema

from .engine import EngineSection
from .errors import ConfigError, require, show
from .explain import keys_of
from .files import load_file
from .limits import Path, Positive, Says
from .lora import LoraSection
from .model import Section, parse, section
from .overrides import apply_overrides
from .quantization import FOREIGN, WITHOUT_ZERO, QuantizationSection
from .sparse import SparseLoRAConfig
from .sparse_base import SparseBaseConfig
from .train import TrainSection

ATTENTION_NAMES = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Transformers takes any other name for a kernel on the Hub, to be fetched and run."""
_Attention = Annotated[str, WithJsonSchema({"type": "string", "enum": list(ATTENTION_NAMES)})]

_Rows = Annotated[Path, Says("a JSONL file, a folder, or a data set's id")]


@section
class ModelSection(Section):
    """The base model."""

    PATH: ClassVar[str] = "model"

    name_or_path: str
    """A folder in Hugging Face format, or the id of a model on the Hub."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the frozen weights and the compute."""

    attn_implementation: _Attention | None = "sdpa"
    """Transformers' name of an attention implementation; None is its own choice."""

    def __post_init__(self) -> None:
        name, at = self.name_or_path, f"{self.PATH}.name_or_path"
        require(bool(name.strip()), at, name, 'the path of a model folder, or a model id such as "org/name"')
        require(
            ".." not in name.replace("\\", "/").split("/") or os.path.exists(name),
            at,
            name,
            "a model id, which never contains '..', or the path of a folder that exists (this one does not)",
        )
        allowed = f"{', '.join(ATTENTION_NAMES)}, or null; no other code is fetched or run"
        given = self.attn_implementation
        require(given in (None, *ATTENTION_NAMES), f"{self.PATH}.attn_implementation", given, allowed)


@section
class DataSection(Section):
    """What is trained on and evaluated on. The row format is detected."""

    PATH: ClassVar[str] = "data"

    train: _Rows
    """A JSONL file, a folder saved by ``datasets``, or the id of a data set on the Hub."""

    eval: _Rows | None = None
    """The same for evaluation; None evaluates nothing."""

    max_length: Annotated[int, Ge(2), Says("integers from 2")] = 1024
    """Tokens per sequence; longer ones are cut."""

    packing: bool | None = None
    """Rows of a step one after another, without padding, each seen by itself alone; null: where the attention can."""

    train_limit: Positive | None = None
    """Use the first rows only."""

    eval_limit: Positive | None = None
    """The same for evaluation."""


def _lora(value: Any) -> Any:
    """PEFT's names stand in the section itself, not under a key."""
    return LoraSection.from_dict(value) if isinstance(value, dict) else value


@section
class RunConfig(Section):
    """All sections of a run. ``sparse_lora`` left out is a plain LoRA run; ``engine`` left out is one process."""

    model: ModelSection
    """The base model."""

    data: DataSection
    """Training and evaluation data."""

    train: TrainSection
    """Length, optimizer, batches, output."""

    lora: Annotated[LoraSection, BeforeValidator(_lora)] = field(default_factory=LoraSection)
    """The adapter, in PEFT's names."""

    sparse_lora: SparseLoRAConfig = field(default_factory=lambda: SparseLoRAConfig(enabled=False))
    """What is left out of the frozen matrices."""

    sparse_base: SparseBaseConfig = field(default_factory=lambda: SparseBaseConfig(enabled=False))
    """Whether the base is pruned and stays so."""

    quantization: QuantizationSection = field(default_factory=QuantizationSection)
    """How the frozen matrices are stored."""

    engine: EngineSection = field(default_factory=lambda: EngineSection(name="single"))
    """Who holds the shards."""

    comment: str | None = Field(default=None, alias="_comment", exclude_if=lambda note: note is None)
    """A note for readers of the file, under the key ``_comment``; nothing reads it."""

    def __post_init__(self) -> None:
        sparse = self.sparse_lora
        if sparse.enabled and not any(sparse.layers.values()):
            raise ConfigError(
                "'sparse_lora.enabled' is true, but 'sparse_lora.layers' is empty, so that nothing would be sparse: "
                'name layers, such as {"ffn": {"3-30": 0.99}}, or set \'sparse_lora.enabled\' to false'
            )

        if self.sparse_base.enabled:
            self._check_masked()

        compute = self.quantization.bnb_4bit_compute_dtype
        if self.quantization.stored == "nf4" and compute not in (None, self.model.dtype):
            raise ConfigError(
                f"'quantization.bnb_4bit_compute_dtype' is \"{compute}\", but 'model.dtype' is \"{self.model.dtype}\": the "
                "products are computed in the model's dtype. Make them equal, or leave the first out"
            )
        zero = self.engine.deepspeed_config().get("zero_optimization", {})
        if self.quantization.stored and zero.get("zero_quantized_weights"):
            raise ConfigError(
                "'engine.deepspeed.zero_optimization.zero_quantized_weights' with 'quantization.load_in_4bit' or "
                "'quantization.format': it would quantise the codes again, as if they were weights. Remove it"
            )

        if self.lora.loftq_rounds:
            self._check_loftq()

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

    def _check_masked(self) -> None:
        """An adapter under a mask is one product with one matrix."""
        lora, branch = self.lora.values, self.sparse_lora.lora_branch
        for key in ("lora_dropout", "lora_bias", "target_parameters"):
            if lora.get(key):
                raise ConfigError(
                    f"'lora.{key}' is {show(lora[key])} with 'sparse_base.enabled': an adapter that keeps a pruned matrix' "
                    "zeros is one matrix with it, without dropout, without a bias, and not on experts. Remove the key"
                )
        if self.quantization.stored in WITHOUT_ZERO:
            raise ConfigError(
                f"'quantization.format' is \"{self.quantization.stored}\" with 'sparse_base.enabled': it has no code for "
                'zero, so that nothing tells what is pruned. Allowed: "nf4", "fp8", or null'
            )
        if self.sparse_base.start == "gradient" and self.lora.init_from:
            raise ConfigError(
                "'sparse_base.start' is \"gradient\" with 'lora.init_from', which says where the adapter starts: use one"
            )
        if self.sparse_lora.enabled and branch != "kept":
            raise ConfigError(
                f"'sparse_lora.lora_branch' is {show(branch)} with 'sparse_base.enabled': the branch is masked with the "
                'matrix that it is added to, and so limited to its kept channels. Allowed: "kept"'
            )

    def _check_loftq(self) -> None:
        """LoftQ decomposes what storing a matrix changes of it."""
        stored, said = self.quantization, "'lora.init_lora_weights' is \"loftq\""
        if stored.stored is None:
            raise ConfigError(
                f"{said}, but the base is not quantised, so that there is nothing to make up for: set "
                "'quantization.format', or remove it"
            )
        if stored.stored in FOREIGN:
            raise ConfigError(
                f"{said} with 'quantization.format' \"{stored.stored}\", whose matrices are read as a checkpoint holds "
                "them: LoftQ stores others. Use a format that is made here (docs/formats.md), or remove it"
            )
        if self.sparse_base.enabled:
            raise ConfigError(
                f"{said} with 'sparse_base.enabled': the adapter would start outside the zeros that it has to keep. "
                "Use one"
            )
        if stored.bits is not None:  # Otherwise a folder may have others than the default.
            self.lora.check_bits(f"'quantization' stores {stored.stored}", stored.width)

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
    def elsewhere(cls, key: str) -> str | None:
        sections: tuple[type[Section], ...] = (ModelSection, DataSection, TrainSection, SparseLoRAConfig)
        sections += (SparseBaseConfig, QuantizationSection, EngineSection)
        homes = [f"'{section.PATH}.{key}'" for section in sections if key in (keys_of(section) or ())]
        return f" outside the sections: did you mean {' or '.join(homes)}?" if homes else None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunConfig:
        """From the object that a run file holds, but for the name of its schema."""
        run = {key: value for key, value in data.items() if key != "$schema"} if isinstance(data, dict) else data
        return parse(cls, run, cls.PATH)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
        """From a JSON (or YAML) file, with ``--section.key value`` words on top."""
        return cls.from_dict(apply_overrides(load_file(path), overrides))
