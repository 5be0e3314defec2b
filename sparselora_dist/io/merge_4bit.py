"""A merged model that is stored in 4 bits, as Transformers and bitsandbytes load and save it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs.nf4_files import file_bytes, file_tensors
from ..layouts import UnsupportedModelError, decoder_layers
from .merge_base import BaseWeights, meta_model


class FourBit:
    """Which matrices of the output are NF4, and its ``quantization_config``.

    They are those that Transformers would quantise: every linear but the LM head; of a base that is quantised already, those
    that are.

    Raises:
        UnsupportedModelError: routed experts, or linears stored the other way round.
        ValueError: bitsandbytes is not installed.
    """

    def __init__(self, weights: BaseWeights, double_quant: bool, dtype: torch.dtype) -> None:
        from transformers import BitsAndBytesConfig
        from transformers.pytorch_utils import Conv1D
        from transformers.quantizers.quantizers_utils import should_convert_module

        if find_spec("bitsandbytes") is None:
            raise ValueError("--save-in-4bit needs bitsandbytes: pip install 'sparselora-dist[quantization]'")
        self.double_quant = double_quant
        section = weights.raw_config.get("quantization_config") or {}
        skip = section.get("llm_int8_skip_modules")
        if weights.quantized:
            self.names = set(weights.quantized)
        else:
            _, model = meta_model(weights.folder)
            if any(layer.experts for layer in decoder_layers(model)):
                raise UnsupportedModelError(
                    f"{weights.folder}: --save-in-4bit of a mixture of experts: bitsandbytes has no form for its experts. "
                    "Merge without it"
                )
            if any(isinstance(module, Conv1D) for module in model.modules()):
                raise UnsupportedModelError(
                    f"{weights.folder}: --save-in-4bit of a family that stores its matrices transposed (Conv1D) is not "
                    "supported. Merge without it"
                )
            head = model.get_output_embeddings()
            skip = [name for name, module in model.named_modules() if module is head]
            skip += sorted(getattr(model, "_keep_in_fp32_modules", None) or [])
            self.names = {
                weights.key(f"{name}.weight")
                for name, module in model.named_modules()
                if type(module) is nn.Linear and should_convert_module(name, skip)
            }
        self.section: dict[str, Any] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skip,
        ).to_dict()

    def bytes_of(self, name: str, shape: tuple[int, ...]) -> int | None:
        """On the disk, about; None of what stays as it is."""
        return file_bytes(shape, self.double_quant) if name in self.names else None

    def tensors(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """What the files hold of one tensor of the merged model."""
        return file_tensors(name, value, self.double_quant) if name in self.names else {name: value}
