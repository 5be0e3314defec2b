"""Who may import what, beside the floors (test_house.py). Read from the sources."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.imports import FOLDERS, ROOT, importers, imports, sources, within

# What operations take or share, and the tool that compiles them.
NO_OPERATION = ("__init__", "activations", "aot", "backend", "choice", "flop_counts", "operands", "operator")
NO_OPERATION += ("formats", "fp8", "levels", "masked_gradient", "masters", "rates", "stored")
OPERATIONS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if path.stem not in NO_OPERATION)
MAX_LINES = 320


def test_the_reader_sees_every_form() -> None:
    """``import a.b``, ``from .a import b``, ``from ..a import b``, imports inside functions."""
    found = set(imports(ROOT / "sparselora_dist" / "io" / "factors.py"))
    assert {"torch.distributed", "sparselora_dist.layouts", "sparselora_dist.io.manifest", "hashlib"} <= found
    assert "sparselora_kernels.reference.score" in set(imports(ROOT / "kernels" / "reference" / "__init__.py"))
    assert "sparselora_dist.train.run" in set(imports(ROOT / "launch" / "train.py"))


def test_kernels_know_torch_and_triton_only() -> None:
    """And bitsandbytes, whose format and functions NF4 are."""
    allowed = {*sys.stdlib_module_names, "torch", "triton", "sparselora_kernels"}
    for path in sources("kernels"):
        for name in imports(path):
            extra = {"bitsandbytes"} if path.name == "nf4.py" else set()
            assert name.split(".")[0] in allowed | extra, f"{path.name} imports {name}"
            assert not within(name, "torch.distributed"), f"{path.name} imports {name}"


def test_the_method_knows_neither_ranks_nor_models() -> None:
    for path in sources("sparselora_dist/method"):
        for name in imports(path):
            forbidden = (
                "torch.distributed",
                "transformers",
                "peft",
                "deepspeed",
                "accelerate",
                "sparselora_dist.config",
            )
            assert not within(name, *forbidden), f"{path.name} imports {name}"


def test_planning_knows_neither_ranks_nor_engines() -> None:
    for path in sources("sparselora_dist/plan"):
        for name in imports(path):
            forbidden = ("torch.distributed", "transformers", "deepspeed", "accelerate")
            assert not within(name, *forbidden), f"{path.name} imports {name}"


def test_each_engine_is_touched_in_one_file() -> None:
    assert importers("deepspeed") == {"sparselora_dist/engines/zero3.py"}
    assert importers("torch.distributed.fsdp", "torch.distributed._composable") == {"sparselora_dist/engines/fsdp2.py"}


def test_nothing_imports_a_top_level_kernels() -> None:
    assert importers("kernels") == set()


def test_the_library_does_not_import_the_launcher_or_tests() -> None:
    assert importers("launch", "tests", "support", "benchmarks", "demo") == set()


def test_launch_only_parses() -> None:
    for path in sources("launch"):
        ours = {name for name in imports(path) if within(name, "sparselora_dist", "sparselora_kernels")}
        assert ours
        for name in ours:
            allowed = ("sparselora_dist.config.run", "sparselora_dist.process", "sparselora_dist.train")
            assert within(name, *allowed), f"{path.name} imports {name}"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_has_a_reference_and_a_test(operation: str) -> None:
    assert (ROOT / "kernels" / "reference" / f"{operation}.py").is_file()
    assert (ROOT / "tests" / "kernels" / f"test_{operation}.py").is_file()


def test_files_stay_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for f in FOLDERS for path in sources(f)}
    assert not {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MAX_LINES}


OUTSIDE = """
import sys
from pathlib import Path
root = Path(sys.argv[1])
import sparselora_kernels
assert callable(sparselora_kernels.lora_linear)
try:
    import kernels
except ImportError:
    pass
else:
    places = [*kernels.__path__, *filter(None, [getattr(kernels, "__file__", None)])]
    assert not any(Path(place).resolve().is_relative_to(root / "kernels") for place in places), places
import sparselora_dist
loaded = {name.split(".")[0] for name in sys.modules}
assert "transformers" not in loaded and "deepspeed" not in loaded, "importing the package starts its dependencies"
print("ok")
"""


def test_the_kernels_are_importable_under_their_own_name_only(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", OUTSIDE, str(ROOT)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip() == "ok", result.stderr[-2000:]
