"""A run whose adapter starts by LoftQ (``lora.init_lora_weights`` "loftq"): from the checkpoint's matrices, one at a time.

Every matrix is read and decomposed by one rank, which tells the others the factors; each rank then stores its own rows as
always, less the shift. A run that continues decomposes nothing: its adapter is the checkpoint's, and so is the shift.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..codecs import Codec
from ..config import ConfigError, LoraSection, ModelSection
from ..config.run import RunConfig
from ..io.adapter_config import PREFIX
from ..io.load import check_made, check_model, frozen_codec, model_without_weights
from ..io.loftq import KEY, SHIFT, Mark, Shift
from ..io.prequantized import PrequantizedError, stored_matrix
from ..io.shard_files import TensorFiles, weight_key
from ..io.stored_names import find_names
from ..io.weights import checkpoint_folder
from ..layouts import decoder_layers
from ..method.channels import TRANSPOSED
from ..method.loftq import Pair, alternate
from ..sharding.placement import Placement

_NAME = "default"


@dataclass
class LoftQLoraConfig(LoraConfig):
    """PEFT's config of an adapter that LoftQ started. PEFT writes every field of a config into its file."""

    loftq: dict[str, Any] | None = None
    """See :mod:`sparselora_dist.io.loftq`."""


@dataclass(frozen=True, slots=True)
class LoftQStart:
    """What a run's base is stored less, and where its adapter starts."""

    mark: Mark
    shift: Shift
    pairs: Mapping[str, Pair] = field(default_factory=dict)
    """fp32 on the CPU, by the module in the causal LM; empty where the adapter is a checkpoint's."""

    def parameters(self) -> dict[str, Tensor]:
        """The adapter's values, by the names that a PEFT model gives its parameters."""
        sides = {
            f"{PREFIX}{module}.lora_{side}": value for module, p in self.pairs.items() for side, value in zip("AB", p)
        }
        return {f"{name}.{_NAME}.weight": value for name, value in sides.items()}

    def put(self, model: Any) -> None:
        """Give a PEFT model, whose adapters are whole, the mark and the values, in the dtype that they have."""
        config = model.peft_config[_NAME]
        config.__class__ = LoftQLoraConfig
        setattr(config, KEY, self.mark.to_dict())
        if not dist.is_initialized() or dist.get_rank() == 0:  # Who saves adapters.
            setattr(model, SHIFT, self.shift)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.parameters().items():
                parameters[name].copy_(value)


@dataclass(frozen=True, slots=True)
class AdaptedMatrix:
    """A matrix that an adapter is on."""

    module: str
    key: str
    transposed: bool
    rank: int
    scaling: float

    @property
    def seed(self) -> int:
        """Of a randomised SVD."""
        return int.from_bytes(sha256(self.module.encode()).digest()[:4], "big")


def loftq_start(config: RunConfig, placement: Placement, adapter: Path | None) -> LoftQStart | None:
    """What LoftQ makes of the run's base; None where the run does not start so. A collective of all ranks.

    Args:
        config: the run.
        placement: whose device decomposes.
        adapter: folder of the adapter that the run continues with, a checkpoint's.

    Raises:
        PrequantizedError: the checkpoint is quantised already.
        ConfigError: an adapter on something else than a linear of a decoder layer.
        CorruptFileError: a matrix holds NaN or infinity; see also :meth:`Shift.read`.
        OtherRankError: another rank raised one of these.
    """
    rounds = config.lora.loftq_rounds
    if not rounds:
        return None
    mark = Mark.of(config.quantization, rounds)
    agreed = Placement(placement.device, group=dist.group.WORLD if dist.is_initialized() else None)
    with agreed.together():
        if adapter:
            return LoftQStart(mark, Shift.read(adapter, mark))
        files = TensorFiles.of_model(checkpoint_folder(config.model.name_or_path))
        matrices = adapted_matrices(config.model, config.lora, files)
        if found := [matrix.key for matrix in matrices if stored_matrix(files, matrix.key)]:
            raise PrequantizedError(
                f"'lora.init_lora_weights' is \"loftq\", but {found[0]} of {files.folder} is quantised already: LoftQ needs "
                "the values. Name the checkpoint that is not, or one that 'sparselora-dist quantize --loftq' made, or start "
                "otherwise"
            )
        check_made(config.quantization, config.model.name_or_path)
        config.lora.check_bits(f"'quantization' stores {mark.format}", mark.bits)
        codec = frozen_codec(config.model, config.quantization)
    me, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    pairs: dict[str, tuple[Pair | None, Pair]] = {}
    with agreed.together():
        for matrix in matrices[me::ranks]:
            pairs[matrix.module] = _decomposed(matrix, files, codec, config, placement.device)
    for number, matrix in enumerate(matrices):
        if ranks > 1:
            box = [pairs.get(matrix.module)]
            dist.broadcast_object_list(box, src=number % ranks)
            assert box[0] is not None
            pairs[matrix.module] = box[0]
    order = [matrix.module for matrix in matrices]
    shifts = {module: shift for module in order if (shift := pairs[module][0])}
    return LoftQStart(mark, Shift(shifts), {module: pairs[module][1] for module in order})


def adapted_matrices(section: ModelSection, lora: LoraSection, files: TensorFiles) -> list[AdaptedMatrix]:
    """What an adapter is on, by PEFT's own matching on a model without weights.

    Raises:
        ConfigError: something else than a linear of a decoder layer.
    """
    base = check_model(section)
    base.__dict__.pop("quantization_config", None)
    plain: Any = model_without_weights(base, getattr(torch, section.dtype), section.attn_implementation)
    find_names(plain, files)
    kinds = {layer.path_of(name): name for layer in decoder_layers(plain) for name in layer.names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What PEFT has to say is said when the run's own model is made.
        model: Any = get_peft_model(plain, lora.build(), low_cpu_mem_usage=True)
    found = []
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        module = path.removeprefix(PREFIX)
        if module not in kinds or not isinstance(layer.get_base_layer(), nn.Linear):
            raise ConfigError(
                f"'lora.init_lora_weights' is \"loftq\", and 'lora.target_modules' names {module!r}, which is no matrix of "
                "a decoder layer: it is not quantised. Leave it out, or start otherwise"
            )
        key = weight_key(files, f"{module}.weight")
        found.append(AdaptedMatrix(module, key, kinds[module] in TRANSPOSED, layer.r[_NAME], layer.scaling[_NAME]))
    return found


def _decomposed(
    matrix: AdaptedMatrix, files: TensorFiles, codec: Codec, config: RunConfig, device: torch.device
) -> tuple[Pair | None, Pair]:
    dtype = getattr(torch, config.model.dtype)

    def stored(weight: Tensor) -> Tensor:
        weight = weight.to(dtype)
        return codec.roundtrip(weight.t().contiguous()).t() if matrix.transposed else codec.roundtrip(weight)

    weight = files.read(matrix.key).to(device)
    files.check_finite(matrix.key, weight)
    rounds = config.lora.loftq_rounds
    *_, (shift, pair) = alternate(weight, stored, matrix.rank, matrix.scaling, rounds, seed=matrix.seed)
    return shift and _on_cpu(shift), _on_cpu(pair)


def _on_cpu(pair: Pair) -> Pair:
    return pair[0].cpu(), pair[1].cpu()
