"""An adapter on the layers that are pruned: what they compute with it, and what is left of them when it is taken out.

With D = s·B·A, W as stored and M = (W ≠ 0):

    merged     V = (W + D) ⊙ M of a matrix whose mask the adapter was trained under, W + D of another
    pruned     P, what a method makes of V
    stored     W' with (W' + D) ⊙ (W' ≠ 0) = P, up to one rounding

All in fp32, rounded once to the model's dtype.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..config import ConfigError
from ..io.adapter import ADAPTER_FILE
from ..io.adapter_config import CONFIG_FILE
from ..io.marker import marked_config
from ..io.merge_adapter import Adapter
from ..io.model_folder import write_json
from ..io.shard_files import TensorFiles, read_json


class LayerAdapter:
    """Args:
    folder: that PEFT wrote.
    files: the model under it.

    Raises:
        ConfigError: it changes more than matrices by plain LoRA.
        OSError, ValueError: see :class:`sparselora_dist.io.merge_adapter.Adapter`.
    """

    def __init__(self, folder: Path, files: TensorFiles) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"--adapter {folder} is not a folder")
        self.adapter = Adapter(folder)
        self.adapter.resolve({name: info.shape for name, info in files.tensors.items()})
        more = [*self.adapter.replaced, *(name for name, delta in self.adapter.deltas.items() if len(delta.keys) == 1)]
        if more:
            raise ConfigError(
                f"--adapter {folder} holds {more[0]!r} beside the factors of plain LoRA (modules_to_save, a bias): only "
                "those can be taken out of a pruned weight again"
            )

    @property
    def sha256(self) -> str:
        """Of the tensors' file, shortened."""
        return hashlib.sha256(self.adapter.path.read_bytes()).hexdigest()[:32]

    def save(self, target: Path, base: Path, pruned: Iterable[str]) -> None:
        """Write it for a pruned base, marked as under the zeros of ``pruned``, names in the base's files."""
        config = read_json(self.adapter.folder / CONFIG_FILE) | {"base_model_name_or_path": str(base)}
        modules = [name.removesuffix(".weight") for name in pruned]
        target.mkdir(exist_ok=True)
        shutil.copyfile(self.adapter.path, target / ADAPTER_FILE)
        write_json(marked_config(config, modules), target / CONFIG_FILE)

    def touches(self, key: str) -> bool:
        """Whether a tensor of the model's files has a delta."""
        return self.adapter.touches(key)

    def merged(self, key: str, stored: Tensor) -> Tensor:
        """V of a stored matrix (out, in); fp32, to the bit what ``sparselora-dist merge`` rounds."""
        value = self.adapter.add(key, stored)
        return value.masked_fill_(stored == 0, 0.0) if key in self.adapter.masked else value

    def effective(self, key: str, stored: Tensor) -> Tensor:
        """What a stored matrix computes with the adapter under its zeros; in its dtype."""
        return self.adapter.add(key, stored).masked_fill_(stored == 0, 0.0).to(stored.dtype)

    def without(self, key: str, pruned: Tensor, stored: Tensor) -> Tensor:
        """W' of what was made of :meth:`merged`; in the dtype of ``stored``.

        Where a method only chooses zeros, W' is W itself with them. A kept weight that comes out as zero, because
        pruning has moved it to what the adapter gives, would be lost with all that it is trained to: it becomes the
        smallest number of its dtype, of the sign of P.

        Args:
            key: the matrix.
            pruned: P, (out, in) fp32.
            stored: W.
        """
        delta = self.adapter.add(key, torch.zeros_like(stored))
        value = torch.where(pruned == self.merged(key, stored), stored.float(), pruned - delta).to(stored.dtype)
        kept = pruned != 0
        smallest = torch.full_like(value, torch.finfo(value.dtype).tiny).copysign_(pruned.to(value.dtype))
        return torch.where(kept & (value == 0), smallest, value).masked_fill_(~kept, 0.0)
