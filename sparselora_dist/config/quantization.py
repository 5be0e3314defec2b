"""The ``quantization`` section: how frozen weights are stored, in bitsandbytes' names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .parse import ConfigError, check_fields, parse_dataclass, refuse_code, show

__all__ = ["QuantizationSection"]

_REFUSED = {
    "load_in_8bit": "8-bit weights are not offered: use 'load_in_4bit', or leave the section out",
    "llm_int8_skip_modules": "every matrix of the decoder layers is 4-bit, the embedding and the LM head never are",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationSection:
    """Left out, or with ``load_in_4bit`` false, frozen weights stay in ``model.dtype``."""

    PATH: ClassVar[str] = "quantization"

    load_in_4bit: bool = False
    """Store the frozen matrices of the decoder layers as NF4."""

    bnb_4bit_quant_type: Literal["nf4"] = "nf4"
    """The 4-bit code book."""

    bnb_4bit_use_double_quant: bool = True
    """Store the scales in 8 bits too."""

    bnb_4bit_compute_dtype: Literal["float32", "bfloat16"] | None = None
    """What the products are computed in; null, or the same as ``model.dtype``."""

    bnb_4bit_quant_storage: str = "uint8"
    """The dtype of the codes in memory."""

    def __post_init__(self) -> None:
        storage = self.bnb_4bit_quant_storage
        if storage != "uint8":
            raise ConfigError(
                f"'{self.PATH}.bnb_4bit_quant_storage' is {show(storage)}: only \"uint8\" is offered. Other storage dtypes "
                "exist so that FSDP can shard codes as if they were floats; here codes and scales are sharded as the bytes "
                "that they are, which no engine casts: remove the key"
            )
        check_fields(self, self.PATH)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> QuantizationSection:
        """From the object that a run file holds."""
        refuse_code(data, cls.PATH)
        for key in data if isinstance(data, dict) else ():
            if key in _REFUSED:
                raise ConfigError(f"'{cls.PATH}.{key}': {_REFUSED[key]}")
        return parse_dataclass(cls, data, cls.PATH)
