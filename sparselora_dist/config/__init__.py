"""Configs: the ``sparse_lora`` settings, both official formats, and the one file that is a whole run."""

from .engine import EngineSection
from .lora import LoraSection
from .official import from_official, from_official_dict
from .parse import ConfigError, apply_overrides, parse_dataclass
from .quantization import QuantizationSection
from .ranges import compact_ranges, expand_ranges
from .run import DataSection, ModelSection, RunConfig
from .sparse import GROUPS, SparseLoRAConfig
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
    "parse_dataclass",
]
