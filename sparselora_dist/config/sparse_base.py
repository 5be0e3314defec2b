"""The ``sparse_base`` section: adapters that keep the zeros of a pruned base model."""

from __future__ import annotations

from typing import ClassVar, Literal

from .limits import Positive, Share
from .model import Section, section


@section
class SparseBaseConfig(Section):
    """``Ŵ = (W + s·B·A) ⊙ (W ≠ 0)`` in every LoRA layer on a pruned matrix: the same names in a dict, JSON and a run."""

    PATH: ClassVar[str] = "sparse_base"

    enabled: bool = True
    """False: the base is not pruned, or its zeros need not be kept; adapters are plain LoRA."""

    gradient: Literal["exact", "straight_through"] = "exact"
    """Of the adapter: that of what is computed, or LoRS', which passes over the mask and is cheaper."""

    start: Literal["lora", "gradient"] = "lora"
    """Where the adapter begins: as ``lora.init_lora_weights`` says; or at the frozen matrix's gradient, A its leading right
    singular vectors and B zero (LoRS)."""

    start_rows: Positive = 128
    """Training rows for that gradient."""

    min_sparsity: Share = 0.2
    """A matrix with a smaller share of zeros is not pruned and keeps plain LoRA. 4 bits make zeros of 9 % of a dense one."""
