"""``sparselora-dist inspect FOLDER --storage``: the formats of a model folder's weights, and their bits a weight."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..config.errors import ConfigError
from ..io.stored_sizes import stored_sizes

# What else stands in a quantization_config is lists of modules and settings of kernels.
_TOLD = ("quant_method", "format", "fmt", "bits", "quant_algo", "load_in_4bit", "bnb_4bit_quant_type")


def run(arguments: argparse.Namespace) -> int:
    """Print; 0.

    Raises:
        ConfigError: an argument that has no meaning here.
        ValueError, OSError: see :func:`stored_sizes`.
    """
    for key in ("config", "data", "ranks", "output", "against"):
        if getattr(arguments, key) is not None:
            raise ConfigError(f"'--{key}' has no meaning with --storage, which reads a model's headers: leave it out")
    settings, storages = stored_sizes(Path(arguments.target))
    if arguments.json:
        print(json.dumps({"quantization_config": settings, "storages": [x.to_dict() for x in storages]}, indent=1))
        return 0
    told = ", ".join(f"{key} {settings[key]}" for key in _TOLD if key in settings) if settings else "none"
    print(f"{arguments.target}: quantization_config: {told}")
    print(f"{'storage':<28}{'tensors':>9}{'values':>14}{'GB':>9}{'bits':>8}")
    for x in storages:
        print(f"{x.name[:27]:<28}{x.tensors:>9}{x.values:>14,}{x.bytes / 1e9:>9.3f}{x.bits:>8.3f}")
    return 0
