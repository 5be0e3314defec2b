"""Configs: the ``sparse_lora`` settings, both official formats, and the one file that is a whole run."""

from .engine import EngineSection
from .errors import ConfigError
from .lora import LoraSection
from .overrides import apply_overrides
from .quantization import QuantizationSection
from .ranges import compact_ranges, expand_ranges
from .run import DataSection, ModelSection, RunConfig
from .sparse import GROUPS, SparseLoRAConfig, from_official, from_official_dict
from .train import TrainSection

__all__ = [
    "GROUPS",
    "ConfigError",
    "DataSection",
    "EngineSection",
    "LoraSection",
    "ModelSection",
    "QuantizationSection",
    "RunConfig",
    "SparseLoRAConfig",
    "TrainSection",
    "apply_overrides",
    "compact_ranges",
    "expand_ranges",
    "from_official",
    "from_official_dict",
]
