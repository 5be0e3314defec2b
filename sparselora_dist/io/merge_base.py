"""The base model of a merge: checked against its config, read one matrix at a time, dequantised where it is quantised."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselora_kernels import EncodedWeight, nonzero

from ..codecs import Codec, NF4Codec
from ..codecs.nf4_files import nonzero_of_codes
from ..layouts import UnsupportedModelError, check_config, decoder_layers
from ..method.channels import TRANSPOSED
from .loftq import Shift
from .manifest import CorruptFileError
from .prequantized import (
    READERS,
    PrequantizedError,
    StoredMatrix,
    all_as_they_are,
    bitsandbytes,
    is_quantised,
    stored_matrix,
)
from .shard_files import FLOATS, PACKED, TensorFiles, TensorInfo, read_json, spaced
from .stored_names import find_names

_STATE = ".quant_state.bitsandbytes__"


class BaseWeights:
    """A model folder as whole matrices: what a matrix is stored as (bf16, bitsandbytes' NF4, fp8 or fp4) is hidden.

    Args:
        folder: ``config.json`` and safetensors; nothing in it is run or unpickled.
        codec: given, the matrices of the decoder layers become what training with this ``quantization.format`` saw.
        dtype: that training computed in.
        shift: what of them was subtracted before they were stored, of an adapter that LoftQ started.

    Attributes:
        shapes: of every matrix and vector by name.
        shards: the names by file, in the files' order.
        raw_config: the contents of ``config.json``.
        quantized: the names of bitsandbytes' 4-bit matrices, and of all the tensors that describe each.
        stored: the matrices that are quantised in another way, by name.

    Raises:
        FileNotFoundError, CorruptFileError: see :meth:`TensorFiles.of_model`; also a tensor that is missing or has
            another shape than ``config.json`` asks for.
        UnsupportedModelError: the family is not supported.
        ValueError: quantised in a way that is not read, or not as ``codec``.
    """

    def __init__(self, folder: Path, codec: Codec | None, dtype: torch.dtype, shift: Shift | None = None) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"--base {folder} is not a folder; download the model first")
        self.folder, self.codec, self.dtype = folder, codec, dtype
        self.raw_config = read_json(folder / "config.json")
        config, model = meta_model(folder)
        self.tied = bool(getattr(config, "tie_word_embeddings", False))
        self.files = TensorFiles.of_model(folder)
        self._check_quantization()
        find_names(model, self.files)
        names = {module: f"{path}.weight" for path, module in model.named_modules()}
        self.head = self.key(names[model.get_output_embeddings()])
        self.embedding = self.key(names[model.get_input_embeddings()])
        self._expected, self._decoder = self._named(model)
        self.quantized = self._find_encoded()
        if (self.quantized or isinstance(codec, NF4Codec)) and find_spec("bitsandbytes") is None:
            raise ValueError("4-bit weights need bitsandbytes: pip install 'sparselora-dist[quantization]'")
        self.stored = {} if self.quantized else self._find_stored()
        self._check_asked()
        self._head_is_embedding = False
        states = {state for states in self.quantized.values() for state in states}
        if self.stored:  # Scales, also of activations: what the model itself does not have.
            states = self.files.tensors.keys() - self._expected.keys()
        self.shapes = {name: info.shape for name, info in self.files.tensors.items() if name not in states}
        self.shapes |= {name: self._encoded_shape(name) for name in self.quantized}
        self.shapes |= {name: found.shape for name, found in self.stored.items()}
        self._check()
        self._shift = (shift or Shift()).by_key(self.files)

    @property
    def shards(self) -> dict[str, list[str]]:
        shards: dict[str, list[str]] = {}
        for name in self.shapes:
            source = self.embedding if name == self.head and self._head_is_embedding else name
            shards.setdefault(self._info(source).file, []).append(name)
        return shards

    def is_float(self, name: str) -> bool:
        """Whether a tensor is cast to the output's dtype: the model's own are, a leftover buffer in the files is not."""
        if name in self.quantized or name in self.stored or (name == self.head and self._head_is_embedding):
            return True
        return name in self._expected and self._info(name).dtype in FLOATS

    def _info(self, name: str) -> TensorInfo:
        return self.files.tensors.get(name) or self.files.tensors[name + PACKED]

    def dequantized(self, name: str) -> bool:
        """Whether :meth:`get` gives what storage in few bits makes of the matrix."""
        if name in self.quantized or name in self.stored:
            return True
        return not (self.quantized or self.stored) and self.codec is not None and name in self._decoder

    def untie(self) -> None:
        """Give the LM head, which a tied model shares with the embedding, a matrix of its own."""
        self._head_is_embedding = True
        self.shapes[self.head] = self.shapes[self.embedding]

    def get(self, name: str) -> Tensor:
        """One tensor, whole; a quantised one in the training dtype, any other as the file has it."""
        if name == self.head and self._head_is_embedding:
            return self.files.get(self.embedding)
        if found := self.stored.get(name):
            return found.rows(0, found.shape[0]).to(self.dtype)
        value = self._decode(name) if name in self.quantized else self.files.get(name)
        return value if (stored := self._stored_again(name, value)) is None else stored[0]

    def masked(self, name: str) -> tuple[Tensor, Tensor]:
        """A matrix as :meth:`get` gives it, and where it is not zero in what training saw; of codes where the code is not
        that of zero."""
        if found := self.stored.get(name):
            return self.get(name), found.kept(0, found.shape[0])
        value = self._decode(name) if name in self.quantized else self.files.get(name)
        if (stored := self._stored_again(name, value)) is not None:
            decoded, weight, transposed = stored
            kept = nonzero(weight)
            return decoded, kept.t() if transposed else kept
        if name in self.quantized:
            return value, nonzero_of_codes(self.files.get(name), self.shapes[name])
        return value, value != 0

    def zeros(self, name: str) -> float:
        """Share of zeros of a matrix in the files: of some values, and where these have hardly any, of all."""
        if found := self.stored.get(name):
            return 1 - found.kept(0, found.shape[0]).double().mean().item()
        value, coded = self.files.get(name), name in self.quantized
        for part in (spaced(value), value):
            kept = nonzero_of_codes(part, (2 * part.numel(),)) if coded else part != 0
            share = 1 - kept.double().mean().item()
            if share >= self.least_zeros(name):
                break
        return share

    def least_zeros(self, name: str) -> float:
        """The share of zeros below which a matrix is not taken for a pruned one."""
        if found := self.stored.get(name):
            return found.least_zeros
        return 0.12 if name in self.quantized else 0.01  # 4-bit codes of weights without zeros have 9 % of them.

    def _stored_again(self, name: str, value: Tensor) -> tuple[Tensor, EncodedWeight, bool] | None:
        """Of a matrix that training quantised: what it became (out, in), as it was stored, and whether transposed."""
        kind = self._decoder.get(name)
        if self.codec is None or kind is None or (name in self.quantized and kind not in TRANSPOSED):
            return None
        # Training keeps what a checkpoint has stored here, and what a quantised one left as it was.
        if self.stored or (self.quantized and name not in self.quantized):
            return None
        value, transposed = self._shift.rows(name, value).to(self.dtype), kind in TRANSPOSED
        try:
            weight = self.codec.whole(value.t().contiguous() if transposed else value)
        except ValueError as error:
            raise ValueError(f"{self.folder / self.files.tensors[name].file}: {name!r}: {error}") from error
        decoded = weight.decode(None, self.dtype)
        return decoded.t() if transposed else decoded, weight, transposed

    def key(self, name: str) -> str:
        """What the files call a parameter of the model."""
        return self.files.renamed.get(name, name)

    def _named(self, model: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """Of what the files must hold, the shapes; and what those of the decoder's matrices are."""
        layers = decoder_layers(model)
        experts = any(layer.experts for layer in layers)
        if self.codec is not None and experts and not all_as_they_are(self.files, self.codec):
            asked = "--load-in-4bit" if isinstance(self.codec, NF4Codec) else "--format"
            raise UnsupportedModelError(
                f"{self.folder}: {asked} of a mixture of experts: what storage in {self.codec.name} makes of its "
                "experts is not merged into. Load the adapter with PEFT instead"
            )
        matrices = {self.key(f"{layer.path_of(name)}.weight"): name for layer in layers for name in layer.names}
        expected: dict[str, tuple[int, ...]] = {}
        for name, tensor in model.state_dict().items():
            if stack := self.files.stacks.get(name):
                expected |= {key: self.files.tensors[key].shape for keys in stack.keys for key in keys}
            else:
                expected[self.key(name)] = tuple(tensor.shape)
        return expected, matrices

    # --- checks ------------------------------------------------------------------------------------------------------

    def _check_quantization(self) -> None:
        section = self.raw_config.get("quantization_config")
        if not section or any(reader.is_quantised(self.files) for reader in READERS if reader is not bitsandbytes):
            return
        method, kind = section.get("quant_method"), section.get("bnb_4bit_quant_type", "fp4")
        if method != "bitsandbytes" or not section.get("load_in_4bit") or kind != "nf4":
            what = f"{method} {kind if section.get('load_in_4bit') else ''}".strip()
            raise ValueError(
                f"{self.folder / 'config.json'}: 'quantization_config' is {what!r}; a base can be merged into when it is "
                "not quantised, or by sparselora-dist, by bitsandbytes with load_in_4bit and nf4, or in fp8, nvfp4 or mxfp4 "
                "(docs/formats.md)"
            )

    def _find_encoded(self) -> dict[str, list[str]]:
        """Names of 4-bit weights, and of all the tensors that describe each."""
        names = self.files.tensors
        weights = [name.split(_STATE)[0] for name in names if _STATE in name]
        return {weight: [name for name in names if name.startswith(f"{weight}.")] for weight in weights}

    def _find_stored(self) -> dict[str, StoredMatrix]:
        if not is_quantised(self.files):
            return {}
        there = self.files.tensors
        names = [name for name in self._expected if name in there or name + PACKED in there]
        return {name: found for name in names if (found := stored_matrix(self.files, name))}

    def _check_asked(self) -> None:
        """A run trains on what a checkpoint has stored as it is, or is refused."""
        if self.codec is None:
            return
        if self.quantized and not isinstance(self.codec, NF4Codec):
            raise ValueError(
                f"{self.folder} is quantised in nf4 already, and a run trains on it as it is: leave --format out"
            )
        for name, found in self.stored.items():
            try:
                found.codec(self.codec, self._decoder.get(name) in TRANSPOSED)
            except PrequantizedError as error:
                raise ValueError(
                    f"{self.folder} is quantised already, and a run trains on it as it is: leave --load-in-4bit out, or "
                    f"--format ({error})"
                ) from error

    def _encoded_shape(self, name: str) -> tuple[int, ...]:
        key = next(state for state in self.quantized[name] if _STATE in state)
        where = f"{self.folder / self.files.tensors[key].file}: {key!r}"
        if not key.endswith("nf4"):
            raise ValueError(f"{where} is not nf4, the only 4-bit code that is supported")
        try:
            state = json.loads(bytes(self.files.get(key).numpy()))
            rows, columns = state["shape"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(f"{where} does not describe a 4-bit matrix ({error!r})") from error
        nested = ("nested_absmax", "nested_quant_map") if "nested_blocksize" in state else ()
        for part in (*nested, "absmax", "quant_map"):
            if f"{name}.{part}" not in self.files.tensors:
                raise CorruptFileError(f"{self.folder} has {key!r}, but no {name + '.' + part!r}")
        packed = self.files.tensors.get(name)
        if packed is None:
            raise CorruptFileError(f"{self.folder} has {key!r}, but no {name!r}")
        if packed.dtype != "U8" or packed.shape != (-(-rows * columns // 2), 1):
            raise CorruptFileError(
                f"{self.folder / packed.file}: {name!r} is {packed.dtype} {packed.shape}, expected U8 codes of a "
                f"{(rows, columns)} matrix: {(-(-rows * columns // 2), 1)}"
            )
        return rows, columns

    def _check(self) -> None:
        for name, shape in self._expected.items():
            if name not in self.shapes:
                if name == self.head and self.tied:
                    continue
                raise CorruptFileError(f"{self.folder} has no tensor {name!r}, which its config.json asks for")
            if self.shapes[name] != shape:
                raise CorruptFileError(
                    f"{self.folder / self._info(name).file}: {name!r} has shape {self.shapes[name]}, "
                    f"config.json asks for {shape}"
                )
            if not self.is_float(name):
                raise ValueError(
                    f"{self.folder / self.files.tensors[name].file}: {name!r} is stored as {self._info(name).dtype}, "
                    f"expected one of {', '.join(FLOATS)}, or bitsandbytes' nf4"
                )

    # --- bitsandbytes ------------------------------------------------------------------------------------------------

    def _decode(self, name: str) -> Tensor:
        """A 4-bit weight in the training dtype; the product of level and absmax is rounded once."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = {state.removeprefix(f"{name}."): self.files.get(state) for state in self.quantized[name]}
        try:
            state = QuantState.from_dict(parts, device=torch.device("cpu"))
            state.dtype = self.dtype
            return dequantize_4bit(self.files.get(name), state)
        except (ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
            where = self.folder / self.files.tensors[name].file
            raise CorruptFileError(f"{where}: {name!r} is not what bitsandbytes writes: {error!r}") from error


def meta_model(folder: Path) -> tuple[Any, Any]:
    """The model's config, and the model on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not a config that Transformers knows: {error!r}") from error
    check_config(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return config, AutoModelForCausalLM.from_config(config, trust_remote_code=False)
