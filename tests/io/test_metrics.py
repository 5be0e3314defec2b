"""The record of a run that was cut off."""

from __future__ import annotations

import json
from pathlib import Path

from sparselora_dist.config.train import TrainSection
from sparselora_dist.train.metrics import MetricsWriter


def test_a_row_that_a_crash_cut_off_is_dropped_with_those_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join(rows) + '\n{"step": 4, "lo')
    writer = MetricsWriter(TrainSection(output_dir=str(tmp_path), disable_tqdm=True), 5, start_step=2, is_main=True)
    writer.row({"step": 3, "loss": 0.5})
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 0.5},
    ]
