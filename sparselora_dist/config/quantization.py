"""The ``quantization`` section: how frozen weights are stored, in bitsandbytes' names."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from .limits import ALLOWED, Says
from .model import Section, section

_REFUSED = {
    "load_in_8bit": ": 8-bit weights are not offered: use 'load_in_4bit', or leave the section out",
    "llm_int8_skip_modules": ": every matrix of the decoder layers is 4-bit, the embedding and the LM head never are",
}
_STORAGE = Says(
    '"uint8"; only "uint8" is offered. Other storage dtypes exist so that FSDP can shard codes as if they were floats; '
    "here codes and scales are sharded as the bytes that they are, which no engine casts: remove the key"
)


@section
class QuantizationSection(Section):
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

    bnb_4bit_quant_storage: Annotated[Literal["uint8"], ALLOWED, _STORAGE] = "uint8"
    """The dtype of the codes in memory."""

    @classmethod
    def elsewhere(cls, key: str) -> str | None:
        return _REFUSED.get(key)
