"""What lies in an output folder is neither overwritten nor silently started over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparselora_dist.config import ConfigError
from sparselora_dist.io.run_folder import claim_folder, last_step, note_checkpoint


def make(
    folder: Path, *, steps: int, save_steps: int | None, checkpoints: tuple[int, ...] = (), done: bool = False
) -> None:
    """What a run leaves after ``steps`` steps."""
    folder.mkdir(exist_ok=True)
    rows = [{"step": 0, "eval_loss": 1.0}, *({"step": step + 1, "loss": 1.0} for step in range(steps))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    (folder / "run.json").write_text(json.dumps({"train": {"save_steps": save_steps}}))
    for step in checkpoints:
        (folder / f"checkpoint-{step}").mkdir()
        note_checkpoint(folder, step)
    if done:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").touch()
        (folder / "summary.json").touch()


def listing(folder: Path) -> dict[str, str | None]:
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else None for p in folder.rglob("*")}


def refused(folder: Path, resume: bool | str, checkpoint: Path | None, words: str) -> None:
    """Nothing is changed."""
    before = listing(folder)
    with pytest.raises(ConfigError, match=words):
        claim_folder(folder, resume, checkpoint)
    assert listing(folder) == before


# --- auto, and nothing to continue -----------------------------------------------------------------------------------


def test_auto_where_checkpoints_are_gone(tmp_path: Path) -> None:
    make(tmp_path, steps=5, save_steps=4, checkpoints=(4,))
    (tmp_path / "checkpoint-4").rmdir()
    words = (
        rf"\"auto\" and {tmp_path} records 5 steps, but checkpoint-4, the newest of this run, is gone .*mounted.*false"
    )
    refused(tmp_path, "auto", None, words)
    claim_folder(tmp_path, False, None)  # As the message says.
    claim_folder(tmp_path, "auto", None)


def test_auto_where_an_older_version_kept_no_note(tmp_path: Path) -> None:
    make(tmp_path, steps=8, save_steps=4)
    refused(tmp_path, "auto", None, "records 8 steps, but its checkpoints are gone")


def test_auto_where_steps_are_all_that_is_left(tmp_path: Path) -> None:
    make(tmp_path, steps=1, save_steps=4)
    (tmp_path / "run.json").unlink()
    refused(tmp_path, "auto", None, "records 1 steps, but its checkpoints are gone")


@pytest.mark.parametrize(("steps", "save_steps"), [(7, 4), (50, None)])
def test_auto_after_a_crash_before_the_first_checkpoint(
    tmp_path: Path, steps: int, save_steps: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A restarted job has to begin again; one checkpoint may have been on its way. It says so."""
    make(tmp_path, steps=steps, save_steps=save_steps)
    claim_folder(tmp_path, "auto", None)
    assert f"records {steps} steps of a run that ended before its first checkpoint" in caplog.text


def test_auto_in_a_new_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    claim_folder(tmp_path, "auto", None)
    assert last_step(tmp_path / "metrics.jsonl") == 0 and not caplog.text


# --- a finished run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resume", "left"),
    [(False, "summary.json"), ("auto", "summary.json"), (False, "adapter/adapter_model.safetensors")],
)
def test_a_finished_run_is_not_trained_over(tmp_path: Path, resume: bool | str, left: str) -> None:
    make(tmp_path, steps=5, save_steps=None, done=True)
    for name in {"summary.json", "adapter/adapter_model.safetensors"} - {left}:
        (tmp_path / name).unlink()
    refused(tmp_path, resume, None, rf"{tmp_path} holds a finished run \({left}\).*another folder")


def test_a_run_cut_off_in_its_last_evaluation_starts_again(tmp_path: Path) -> None:
    """Its adapter is there already; it has no checkpoint to continue from."""
    make(tmp_path, steps=5, save_steps=None, done=True)
    (tmp_path / "summary.json").unlink()
    claim_folder(tmp_path, "auto", None)


def test_nor_by_a_run_that_continues_another_folders_checkpoint(tmp_path: Path) -> None:
    make(tmp_path / "a", steps=4, save_steps=2, checkpoints=(2, 4))
    make(tmp_path / "done", steps=5, save_steps=None, done=True)
    make(tmp_path / "begun", steps=3, save_steps=2, checkpoints=(2,))
    start = tmp_path / "a" / "checkpoint-2"
    refused(tmp_path / "done", str(start), start, "holds a finished run")
    refused(tmp_path / "begun", str(start), start, r"holds checkpoint-2 of an earlier run.*resume true.*another folder")


# --- branches --------------------------------------------------------------------------------------------------------


def test_an_abandoned_branch_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, steps=6, save_steps=2, checkpoints=(2, 4, 6), done=True)
    rows = (tmp_path / "metrics.jsonl").read_text()
    claim_folder(tmp_path, str(tmp_path / "checkpoint-2"), tmp_path / "checkpoint-2", 2)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    aside = tmp_path / "abandoned-1"
    names = ["adapter", "checkpoint-4", "checkpoint-6", "metrics.jsonl", "summary.json"]
    assert sorted(path.name for path in aside.iterdir()) == names
    assert (aside / "metrics.jsonl").read_text() == (tmp_path / "metrics.jsonl").read_text() == rows
    assert f"what came after it (checkpoint-4, checkpoint-6) is in {aside} now" in caplog.text
    (tmp_path / "checkpoint-4").mkdir()
    claim_folder(tmp_path, str(tmp_path / "checkpoint-2"), tmp_path / "checkpoint-2", 2)
    assert [path.name for path in (tmp_path / "abandoned-2").glob("checkpoint-*")] == ["checkpoint-4"]


def test_the_newest_checkpoint_leaves_everything_where_it_is(tmp_path: Path) -> None:
    make(tmp_path, steps=5, save_steps=2, checkpoints=(2, 4), done=True)
    before = listing(tmp_path)
    claim_folder(tmp_path, True, tmp_path / "checkpoint-4", 4)
    assert listing(tmp_path) == before
