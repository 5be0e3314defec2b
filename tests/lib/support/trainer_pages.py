"""The commands of docs/trainers, as they stand there, and a folder in which they run at the size of a test."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .harness import LIBRARY, ROOT, run_launch

PAGES = ROOT / "docs" / "trainers"


@dataclass(frozen=True)
class Command:
    """``launcher`` up to the script, then the script with its arguments."""

    launcher: tuple[str, ...]
    script: tuple[str, ...]

    @property
    def name(self) -> str:
        """The last part of its ``--output_dir``."""
        at = len(self.script) - self.script[::-1].index("--output_dir")
        return Path(self.script[at]).name

    def with_engine(self, engine: str) -> Command:
        """By another file of configs/accelerate, into another folder."""
        launcher = tuple(re.sub(r"accelerate/\w+\.yaml", f"accelerate/{engine}.yaml", word) for word in self.launcher)
        script = list(self.script)
        script[script.index("--output_dir") + 1] += f"-{engine}"
        return Command(launcher, tuple(script))


def blocks(page: str, language: str = "") -> list[str]:
    """What stands between fences on a page; ``language`` is that of the fence, none for commands."""
    text = (PAGES / page).read_text(encoding="utf-8")
    return [block for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M) if kind == language]


def commands(page: str) -> list[Command]:
    """Every command of a page that starts a script in examples/."""
    found = []
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            words = tuple(shlex.split(line))
            at = next(
                (i for i, word in enumerate(words) if word.startswith("examples/") and word.endswith(".py")), None
            )
            if at is not None:
                found.append(Command(words[:at], words[at:]))
    return found


def run_all(launcher: tuple[str, ...], runs: list[list[Any]], folder: Path) -> list[dict[str, dict[str, Any]]]:
    """``[name, script with arguments]`` one after another in one start of the launcher; what each rank saw."""
    seen = folder / f"seen-{abs(hash(launcher))}"
    seen.mkdir()
    run_launch(
        [*launcher, str(LIBRARY / "support" / "launched.py")],
        cwd=folder,
        SPARSELORA_RUNS=json.dumps(runs),
        SPARSELORA_SEEN=str(seen),
        PYTHONPATH=os.pathsep.join(filter(None, [str(LIBRARY), os.environ.get("PYTHONPATH")])),
        HF_DATASETS_CACHE=str(folder / "cache"),
        HF_HUB_OFFLINE="1",
    )
    return [torch.load(path, weights_only=False) for path in sorted(seen.glob("*.pt"))]


def clone(folder: Path, rows: int) -> Path:
    """A folder that looks like the project's, with the first rows of the demo's data."""
    for name in ("examples", "configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "demo" / "data").mkdir(parents=True)
    (folder / "demo" / "model").symlink_to(ROOT / "demo" / "model")
    lines = (ROOT / "demo" / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "demo" / "data" / "train.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
    kept = json.loads((ROOT / "examples" / "sparse_lora.json").read_text(encoding="utf-8")) | {"interval": 4}
    (folder / "interval4.json").write_text(json.dumps(kept), encoding="utf-8")
    return folder
