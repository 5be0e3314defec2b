"""What an output folder holds of earlier runs: what a new one must not overwrite, continue by mistake, or start over."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from ..config import ConfigError
from .adapter import ADAPTER_FILE
from .checkpoint import list_checkpoints
from .manifest import write_text

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
_NEWEST = "newest.json"


def note_checkpoint(folder: Path, step: int) -> None:
    """Remember that a checkpoint was published, so that one that is lost later is missed."""
    write_text(folder / _NEWEST, json.dumps({"checkpoint": step}))


def claim_folder(folder: Path, resume: bool | str, checkpoint: Path | None, step: int = 0) -> None:
    """Make the folder ready for a run that continues from ``checkpoint`` at ``step``, or from nothing.

    Raises:
        ConfigError: something of an earlier run would be overwritten, or was there and is lost. Nothing is changed then.
    """
    found = list_checkpoints(folder)
    results = [name for name in (f"adapter/{ADAPTER_FILE}", "summary.json") if (folder / name).exists()]
    if checkpoint and checkpoint.parent.resolve() == folder.resolve():
        _set_aside_after(checkpoint, step)
        return
    if found:
        raise ConfigError(
            f"train.output_dir {folder} holds {found[-1].name} of an earlier run: continue it with train.resume true, or "
            "use another folder"
        )
    # Before its last evaluation a run writes its adapter: one that was cut off there and is started again makes it anew.
    cut_off = resume == "auto" and "summary.json" not in results
    if results and not cut_off:
        raise ConfigError(
            f"train.output_dir {folder} holds a finished run ({', '.join(results)}), which this one would overwrite: use "
            "another folder, or move those away"
        )
    if checkpoint is None and resume == "auto":
        _miss_lost_checkpoints(folder)
    (folder / _NEWEST).unlink(missing_ok=True)


def last_step(metrics: Path) -> int:
    """The last step that a ``metrics.jsonl`` records; 0 where it records none."""
    last = 0
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        try:
            last = max(last, int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue  # A crash cut it off.
    return last


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _miss_lost_checkpoints(folder: Path) -> None:
    """``auto`` in a folder without checkpoints is a fresh start only where there never were any."""
    recorded = last_step(folder / METRICS)
    saved = _read(folder / _NEWEST).get("checkpoint")
    every: int | None = 0
    if run := _read(folder / "run.json"):
        every = run.get("train", {}).get("save_steps")
    elif not recorded:
        every = None  # Steps without their settings: more than checkpoints is gone.
    # One checkpoint may have been on its way to the disk when the run was cut off, not two.
    if saved or (every is not None and recorded >= 2 * every):
        lost = f"checkpoint-{saved}, the newest of this run, is gone" if saved else "its checkpoints are gone"
        raise ConfigError(
            f'train.resume is "auto" and {folder} records {recorded} steps, but {lost} (is a volume not mounted?): '
            "restore what is lost, or start at step 1 with train.resume false or in another folder"
        )
    if recorded:
        log.warning(
            "%s records %d steps of a run that ended before its first checkpoint: starting at step 1", folder, recorded
        )


def _set_aside_after(checkpoint: Path, step: int) -> None:
    """A branch that is left: its later checkpoints and results go elsewhere, so that ``auto`` never continues it."""
    folder = checkpoint.parent
    later = [path for path in list_checkpoints(folder) if int(path.name.rpartition("-")[2]) > step]
    if not later:
        return
    aside = next(path for number in range(1, 10**6) if not (path := folder / f"abandoned-{number}").exists())
    aside.mkdir()
    if (folder / METRICS).is_file():
        shutil.copy2(folder / METRICS, aside)
    for path in [*reversed(later), folder / "adapter", folder / "summary.json"]:
        if path.exists():
            path.rename(aside / path.name)
    log.warning(
        "continuing from %s: what came after it (%s) is in %s now",
        *(checkpoint, ", ".join(path.name for path in later), aside),
    )
