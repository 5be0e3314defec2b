"""The ``quantization`` section: how frozen weights are stored; NF4 also in bitsandbytes' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from .errors import ConfigError
from .limits import ALLOWED, Says
from .model import Section, section

Format = Literal["nf4", "fp8", "hqq", "bcq", "shiftadd", "billm", "nvfp4", "mxfp4"]
BITS: Mapping[str, tuple[int, ...]] = {
    "nf4": (4,),
    "fp8": (8,),
    "hqq": (2, 3, 4),
    "bcq": (2, 3, 4),
    "shiftadd": (2, 3, 4),
    "billm": (2,),
    "nvfp4": (4,),
    "mxfp4": (4,),
}
"""What a code of each format may take; the last one is the default where several are allowed, but for 3 of ``shiftadd``."""
FOREIGN = ("nvfp4", "mxfp4")
"""Those that other libraries make."""
READ_ONLY = ("billm", *FOREIGN)
"""Those that are never made when a model is loaded: a checkpoint holds them."""
WITHOUT_ZERO = ("hqq", "bcq", "shiftadd", "billm")
"""Those whose codes cannot say that a value is zero."""

_REFUSED = {
    "load_in_8bit": ": bitsandbytes' 8 bits are not offered: use 'load_in_4bit' or 'format', or leave the section out",
    "llm_int8_skip_modules": ": every matrix of the decoder layers is 4-bit, the embedding and the LM head never are",
}
_STORAGE = Says(
    '"uint8"; only "uint8" is offered. Other storage dtypes exist so that FSDP can shard codes as if they were floats; '
    "here codes and scales are sharded as the bytes that they are, which no engine casts: remove the key"
)


@section
class QuantizationSection(Section):
    """Left out, or without a format, frozen weights stay in ``model.dtype``."""

    PATH: ClassVar[str] = "quantization"

    format: Format | None = None
    """How the frozen matrices of the decoder layers are stored; see docs/formats.md."""

    bits: Literal[2, 3, 4, 8] | None = None
    """Of a code: 2, 3 or 4 of hqq, bcq and shiftadd (null: 4, 4 and 3); the others have one width."""

    fp8_compute: bool = True
    """Of fp8, on GPUs that multiply it: inputs are rounded to fp8 too, a scale a token. False: decode, multiply in
    ``model.dtype``."""

    load_in_4bit: bool = False
    """The same as ``format`` "nf4"."""

    bnb_4bit_quant_type: Literal["nf4"] = "nf4"
    """The 4-bit code book."""

    bnb_4bit_use_double_quant: bool = True
    """Store the scales in 8 bits too."""

    bnb_4bit_compute_dtype: Literal["float32", "bfloat16"] | None = None
    """What the products are computed in; null, or the same as ``model.dtype``."""

    bnb_4bit_quant_storage: Annotated[Literal["uint8"], ALLOWED, _STORAGE] = "uint8"
    """The dtype of the codes in memory."""

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.format not in (None, "nf4"):
            raise ConfigError(
                f"'quantization.load_in_4bit' is true, which is nf4, but 'quantization.format' is \"{self.format}\": leave "
                "one of them out"
            )
        if self.bits is None:
            return
        if self.stored is None:
            raise ConfigError(
                f"'quantization.bits' is {self.bits}, but no 'quantization.format' is given: name one, or remove it"
            )
        if self.bits not in BITS[self.stored]:
            allowed = ", ".join(map(str, BITS[self.stored]))
            raise ConfigError(f"'quantization.bits' is {self.bits}, but {self.stored} has {allowed}")

    @property
    def stored(self) -> Format | None:
        """The format; ``None`` for values in ``model.dtype``."""
        return "nf4" if self.load_in_4bit else self.format

    @property
    def width(self) -> int:
        """Bits of a code of :attr:`stored`."""
        assert self.stored is not None
        return self.bits or (3 if self.stored == "shiftadd" else BITS[self.stored][-1])

    @property
    def label(self) -> str | None:
        """In a table: ``nf4``, ``bcq3``."""
        return f"{self.stored}{self.width}" if self.stored and len(BITS[self.stored]) > 1 else self.stored

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from another storage, the same however it is said."""
        if self.stored is None:
            return {"load_in_4bit": False}
        if self.stored == "nf4":
            return {"load_in_4bit": True, "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant}
        computed = {"fp8_compute": self.fp8_compute} if self.stored == "fp8" else {}
        return {"format": self.stored, "bits": self.width} | computed

    @classmethod
    def elsewhere(cls, key: str) -> str | None:
        return _REFUSED.get(key)
