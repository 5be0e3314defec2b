"""The ``sparse_lora`` section: which channels of which layers are left out, when, and who chooses them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, WithJsonSchema

from .errors import ConfigError, require, unknown_key
from .files import SUFFIXES, load_file
from .limits import NonNegative, Path, Positive, Says, Share
from .model import Section, section
from .official import FOLDER_FILES, is_official, read_official
from .ranges import RANGES_SCHEMA, check_ranges, resolve_ranges

GROUPS = ("ffn", "qk", "vo", "experts")

Step = Annotated[Share | NonNegative, Says("a float in [0, 1] (fraction of the run) or an integer from 0 (step)")]
_LAYERS = WithJsonSchema(
    {"type": "object", "properties": dict.fromkeys(GROUPS, RANGES_SCHEMA), "additionalProperties": False}
)


def _check_layers(layers: Any) -> Any:
    """Ahead of the type check, so that a sparsity of "0.9" or true is answered by what a sparsity may be."""
    at = "sparse_lora.layers"
    require(isinstance(layers, dict), at, layers, 'an object such as {"ffn": {"3-30": 0.99}}')
    for group, ranges in layers.items():
        if group not in GROUPS:
            raise unknown_key(at, group, GROUPS)
        require(isinstance(ranges, dict), f"{at}.{group}", ranges, 'an object of ranges, such as {"3-30": 0.99}')
        check_ranges(ranges, f"{at}.{group}")
    return layers


@section
class SparseLoRAConfig(Section):
    """Settings of the method: the same names in a dict, JSON, YAML and the ``sparse_lora`` section of a run."""

    PATH: ClassVar[str] = "sparse_lora"

    enabled: bool = True
    """False: plain PEFT LoRA, nothing is replaced."""

    rank: Positive = 8
    """Rank of the estimator factors that predict which channels matter."""

    layers: Annotated[dict[str, dict[str, float]], BeforeValidator(_check_layers), _LAYERS] = field(
        default_factory=dict
    )
    """Per channel group (``ffn``, ``qk``, ``vo``, and ``experts``, the routed ones of a mixture): layer ranges (``"5"``,
    ``"3-30"``, ``"14-19,21-23"``, ends included; ``"auto"`` is every layer that can) and their sparsity in [0, 1), the share
    of channels left out, of every expert for ``experts``. Layers that are not named are dense."""

    start_step: Step = 0.0
    """Training is dense before this. A float is a fraction of the run in [0, 1]; an int is a step number."""

    end_step: Step | None = None
    """Training is dense from here on. A float is a fraction of the run in [0, 1], an int is a step number, None is the
    end. JSON writers drop the ``.0``, so ``1`` is read as ``1.0``, the whole run."""

    mask_sync: Literal["global", "node", "local"] = "global"
    """Whose tokens choose the channels: of all data-parallel ranks, of one node's, or of each rank alone."""

    interval: Positive = 1
    """Steps for which a layer keeps its channels before they are chosen again."""

    reference: Literal["sparse", "dense"] = "sparse"
    """Forwards without gradients in training mode, as of a reference model or of the policy before the step: computed as
    the policy is, with its masks where they see the same tokens; or dense, which compares a sparse policy with a dense one
    (DPO's loss does not begin at ln 2, GRPO clips tokens at once)."""

    lora_branch: Literal["kept", "dense"] = "kept"
    """The adapters inside the FFN: ``kept`` drops a neuron whole, ``dense`` keeps full width as the paper does."""

    skip_unused_logits: bool = True
    """In training, run the LM head, the loss and the last layer's q, o and FFN only at positions whose next token carries
    a label. Exact, also for a plain LoRA run (``enabled`` false). The model's training ``logits`` then hold these
    positions only."""

    merge_lora: bool = False
    """Add the LoRA update to the frozen weight in every product of all tokens where that takes fewer FLOPs (RunLoRA). It
    rounds the update to the weight's precision; off, every order that is chosen is exact."""

    factors: Annotated[Path, Says("the path of a factor file")] | None = None
    """A file of estimator factors; None builds them once and keeps them in the cache."""

    def __post_init__(self) -> None:
        if self.end_step == 1:
            object.__setattr__(self, "end_step", 1.0)
        at, end = f"{self.PATH}.end_step", self.end_step
        require(end != 0, at, end, "more than 0, or null for the end of the run")
        if end is not None and type(self.start_step) is type(end):
            require(self.start_step < end, at, end, f"more than {self.PATH}.start_step ({self.start_step})")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *suffixes: str, mode: str = "o1") -> SparseLoRAConfig:
        """From a ``.json``, ``.yaml`` or ``.yml`` file with the keys above, or in an official format.

        An official file may be given by its folder; ``mode`` picks among a file's ``modes``.
        """
        if os.path.isdir(path):
            return from_official(path, mode)
        data = load_file(path, suffixes or SUFFIXES)
        if is_official(data) or mode != "o1":
            return from_official_dict(data, mode, source=os.fspath(path))
        return cls.from_dict(data)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> SparseLoRAConfig:
        """``from_file`` for a file whose name ends in ``.json``."""
        return cls.from_file(path, ".json")

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> SparseLoRAConfig:
        """``from_file`` for a file whose name ends in ``.yaml`` or ``.yml``."""
        return cls.from_file(path, ".yaml", ".yml")

    def sparsity(
        self, num_layers: int, able: Mapping[str, Collection[int]] | None = None
    ) -> dict[str, dict[int, float]]:
        """``{group: {layer: sparsity}}`` for a model with ``num_layers`` layers, with all groups as keys.

        What ``layers`` says, whether ``enabled`` or not. A range that the model does not have is a ConfigError. ``able``
        are the layers by group that ``"auto"`` stands for, by default all.
        """
        at = f"{self.PATH}.layers"
        return {
            group: resolve_ranges(self.layers.get(group, {}), num_layers, f"{at}.{group}", (able or {}).get(group))
            for group in GROUPS
        }


def from_official(path: str | os.PathLike[str], mode: str = "o1") -> SparseLoRAConfig:
    """Read an official YAML, ``config.json`` or ``args.json``, or the folder with one; ``mode`` picks among its ``modes``.

    A model's own ``config.json`` beside ``args.json`` is passed over.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        names = [os.path.join(name, file) for file in FOLDER_FILES if os.path.isfile(os.path.join(name, file))]
        if not names:
            looked = os.path.join(name, FOLDER_FILES[0])
            raise ConfigError(
                f"config file '{looked}' cannot be read: there is none, and no {FOLDER_FILES[1]} beside it"
            )
        name = next((file for file in names if is_official(load_file(file))), names[0])
    return from_official_dict(load_file(name), mode, source=name)


def from_official_dict(data: dict[str, Any], mode: str = "o1", *, source: str = "official config") -> SparseLoRAConfig:
    """As ``from_official`` for data in memory; ``source`` names it in errors."""
    try:
        return SparseLoRAConfig.from_dict(read_official(data, mode))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
