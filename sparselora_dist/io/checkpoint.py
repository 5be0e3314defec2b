"""Checkpoints: ``checkpoint-<step>/`` under the output folder, published whole or not at all.

    adapter/                   PEFT's format, fp32 masters
    optimizer.safetensors      <parameter>.exp_avg, <parameter>.exp_avg_sq: whole tensors, fp32
    ranks.safetensors          <rank>/rng..., <rank>/mask/...: random states, and masks kept over steps;
                               <rank>/optim/...: an 8-bit optimizer's codes, beside the fp32 moments that they stand for
    state.json                 step, sizes, scheduler, versions
    manifest.json              SHA-256 of each of these; written last

Whole tensors by name and no pickle: a checkpoint loads at any number of ranks and under any engine, and loading one
runs no code. The frozen base is never in it.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .adapter import ADAPTER_FILE, save_adapter
from .manifest import CorruptFileError, file_sha256, publish, read_safetensors, saving

FORMAT = "sparselora-checkpoint/1"
_NAME = re.compile(r"checkpoint-(\d+)")
_MANIFEST = "manifest.json"
_GUARDED = (f"adapter/{ADAPTER_FILE}", "optimizer.safetensors", "ranks.safetensors", "state.json")
"""What a manifest must name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """What ``state.json`` holds."""

    step: int
    """Optimizer steps done; also the position in the data."""
    optimizer_steps: int
    """Steps that the optimizer counted (a batch without labels takes none)."""
    world_size: int
    global_batch_size: int
    engine: str
    tokens: int
    """Real tokens trained on so far."""
    scheduler: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    """Running sums of the run's summary."""
    fingerprint: dict[str, Any] = field(default_factory=dict)
    """What decided its numbers, by key; empty of an older version."""
    optim: str = "adamw_torch"
    """The optimizer that ran, by its name in ``train.optim``; "deepspeed ..." where DeepSpeed's JSON made it."""
    format: str = FORMAT


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in memory; tensors whole, on the CPU."""

    state: RunState
    parameters: dict[str, Tensor]
    """PEFT's names (those of ``adapter_model.safetensors``) when loaded, the model's own when saved."""
    moments: dict[str, Tensor]
    per_rank: dict[str, Tensor]
    """``<rank>/<name>``."""

    def rank(self, rank: int) -> dict[str, Tensor]:
        """The tensors of one rank, without its prefix."""
        prefix = f"{rank}/"
        return {name.removeprefix(prefix): t for name, t in self.per_rank.items() if name.startswith(prefix)}


def save_checkpoint(model: Any, checkpoint: Checkpoint, output_dir: Path, keep: int | None = None) -> Path:
    """Write a checkpoint (one rank does this) and delete the oldest beyond ``keep``.

    Raises:
        OSError: the disk is full or not writable; the path is named, and nothing that was saved before is touched.
    """
    final = output_dir / f"checkpoint-{checkpoint.state.step}"
    temporary = output_dir / f".checkpoint-{checkpoint.state.step}.tmp"
    tensors = [*checkpoint.parameters.values(), *checkpoint.moments.values(), *checkpoint.per_rank.values()]
    with saving(final, sum(tensor.nbytes for tensor in tensors)), contextlib.ExitStack() as stack:
        shutil.rmtree(temporary, ignore_errors=True)
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)  # What is half written does not fill the disk.
        temporary.mkdir(parents=True)
        save_adapter(model, checkpoint.parameters, temporary / "adapter")
        save_file(checkpoint.moments, temporary / "optimizer.safetensors")
        save_file(checkpoint.per_rank, temporary / "ranks.safetensors")
        (temporary / "state.json").write_text(json.dumps(asdict(checkpoint.state), indent=1), encoding="utf-8")
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(temporary)): file_sha256(path) for path in files}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if final.exists():
            # Saving the same step again: the old one stays until the new one is whole.
            aside = output_dir / f".checkpoint-{checkpoint.state.step}.old"
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
            publish(temporary, final)
            shutil.rmtree(aside)
        else:
            publish(temporary, final)
    for old in list_checkpoints(output_dir)[:-keep] if keep else ():
        if old != final:  # Later steps of an older run may lie in the folder.
            shutil.rmtree(old)
    return final


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The last one that was published; only looks."""
    found = [(int(m[1]), path) for path in output_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return max(found)[1] if found else None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    for aside in output_dir.glob(".checkpoint-*.old"):
        # A save of the same step was cut off between taking the old one away and putting the new one in its place.
        if not (final := output_dir / aside.name[1 : -len(".old")]).exists():
            with contextlib.suppress(FileNotFoundError):  # Another rank was faster.
                aside.rename(final)
    found = [(int(m[1]), path) for path in output_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def resolve_resume(resume: bool | str, output_dir: Path) -> Path | None:
    """The checkpoint to continue from: ``True`` is the newest, ``"auto"`` the newest if there is one, else a path.

    Raises:
        FileNotFoundError: there is none. A run that was told to continue never starts afresh.
    """
    if resume is False:
        return None
    if isinstance(resume, str) and resume != "auto":
        list_checkpoints(Path(resume).parent)  # Puts one back whose saving again was cut off.
        if not (Path(resume) / _MANIFEST).is_file():
            raise FileNotFoundError(f"train.resume: {resume} is not a checkpoint (it has no {_MANIFEST})")
        return Path(resume)
    found = list_checkpoints(output_dir)
    if not found and resume is True:
        raise FileNotFoundError(
            f"train.resume is true, but {output_dir} holds no checkpoint-*: check train.output_dir, or start anew "
            "without train.resume"
        )
    return found[-1] if found else None


def checkpoint_digest(path: Path) -> str:
    """A short hash of all that a checkpoint holds."""
    return file_sha256(path / _MANIFEST)[:16]


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        CorruptFileError: a file is missing, truncated or altered; it is named, with both hashes.
    """
    try:
        manifest: dict[str, str] = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        unnamed = [name for name in _GUARDED if not isinstance(manifest.get(name), str)]
    except (OSError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"{path / _MANIFEST} cannot be read: {error}") from error
    if unnamed:
        raise CorruptFileError(
            f"{path / _MANIFEST} has no SHA-256 of {', '.join(unnamed)}: nothing vouches for them. Resume from an older "
            "checkpoint"
        )
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            raise CorruptFileError(f"{file} is missing from the checkpoint: resume from an older one")
        actual = file_sha256(file)
        if actual != expected:
            raise CorruptFileError(
                f"{file} is damaged: SHA-256 is {actual}, expected {expected}: resume from an older checkpoint"
            )
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise CorruptFileError(f"{path} has format {state.get('format')!r}, this version reads {FORMAT!r}")
    return Checkpoint(
        state=RunState(**state),
        parameters=read_safetensors(path / "adapter" / ADAPTER_FILE)[0],
        moments=read_safetensors(path / "optimizer.safetensors")[0],
        per_rank=read_safetensors(path / "ranks.safetensors")[0],
    )
