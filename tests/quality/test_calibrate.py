"""The command: one process, ZeRO-3 and FSDP2 alike; killed and continued; its output trains; what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sparselora_dist import SparseLoRAConfig
from sparselora_dist.cli import main
from sparselora_dist.engines.ranks import free_port
from sparselora_dist.quality import heatmap
from support.every_type import tiny_config, tiny_model
from support.harness import ROOT, run_launch
from support.merging import make_adapter
from support.models import tiny_base

from ..integration.conftest import VOCABULARY, Tiny, byte_tokenizer, write_rows

LEVELS = (0.5, 0.9)
GROUPS = {"ffn", "qk", "vo"}
PROBES = 3 * len(LEVELS) * 3  # Groups, levels, layers; every level keeps channels of its own.
# 13 rows in batches of 8: stand-ins fill the second.
OPTIONS = ["--target-flops", "0.6", "--levels", ",".join(map(str, LEVELS)), "--rows", "13"]
# Sums in fp32, in another order on several ranks.
LOSS_TOLERANCE = 5e-6


def words(config: str, output: Path) -> list[str]:
    return ["calibrate", "--config", config, *OPTIONS, "--output", str(output)]


def curves_of(folder: Path) -> dict[str, Any]:
    curves = json.loads((folder / "curves.json").read_text(encoding="utf-8"))
    del curves["command"]
    return curves


def losses_of(curves: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    return {
        (group, layer, level): loss
        for group, layers in curves["losses"].items()
        for layer, levels in layers.items()
        for level, loss in levels.items()
    }


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibrations")


@pytest.fixture(scope="module")
def single(tiny: Tiny, work: Path) -> Path:
    """A calibration by one process."""
    config = tiny.config_file(work / "single.json", "single", work / "run", sparse_lora={"start_step": 0})
    result = run_launch([sys.executable, "-m", "sparselora_dist.cli", *words(config, work / "single")])
    assert "sparse_lora.json" in result.stderr
    return work / "single"


def test_what_is_written(single: Path) -> None:
    curves = curves_of(single)
    assert set(curves["losses"]) == GROUPS and len(losses_of(curves)) == PROBES
    assert len(set(losses_of(curves).values())) > PROBES // 2, "sparsity changes the loss"
    assert len(curves["layer_importance"]) == 3 and all(0 <= value <= 1 for value in curves["layer_importance"])
    assert 0.5 < curves["context_share"] < 0.9
    section = SparseLoRAConfig.from_file(single / "sparse_lora.json")
    assert section.layers == curves["choice"]["layers"]
    assert section.enabled and section.rank == 4 and section.interval == 2, "what is not chosen is the run's"
    chosen = [(g, i, s) for g, layers in section.sparsity(3).items() for i, s in layers.items()]
    assert chosen and {level for _, _, level in chosen} <= set(LEVELS)
    assert curves["choice"]["proven_least"] and curves["flops"]["chosen_share"] <= 0.6
    gains = {key: max(loss - curves["dense_loss"], 0) for key, loss in losses_of(curves).items()}
    predicted = sum(gains[group, str(layer), str(level)] for group, layer, level in chosen)
    assert curves["choice"]["predicted_loss_increase"] == pytest.approx(predicted, abs=1e-12)


def test_the_last_layers_ffn_is_free(single: Path) -> None:
    """What a context token's FFN adds after the last attention enters no label's logits: it is not computed at all."""
    curves = curves_of(single)
    assert set(curves["losses"]["ffn"]["2"].values()) == {curves["dense_loss"]}
    savings = [curves["flops"][f"saving_of_{which}"] for which in ("a_layer", "the_last_layer")]
    for level in map(str, LEVELS):
        assert savings[1]["ffn"][level] == 0 < savings[0]["ffn"][level]
        for group in ("qk", "vo"):
            assert savings[1][group][level] < savings[0][group][level]
    assert 2 not in SparseLoRAConfig.from_file(single / "sparse_lora.json").sparsity(3).get("ffn", {})


def test_the_picture(single: Path) -> None:
    with Image.open(single / "sensitivity.png") as image:
        image.load()
        assert image.format == "PNG" and image.width >= 720
        assert image.height > 3 * 24 * len(LEVELS) + 200, "three panels, captions, legend"
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 24)}
    assert colours[214, 39, 40] > 200, "the choice is outlined"
    assert len(colours) > 20


def picture(**changes: Any) -> heatmap.HeatMap:
    values = {(layer, "ffn"): {0.5: -0.1, 0.9: 0.2 * layer} for layer in range(3)}
    plain: dict[str, Any] = {
        "groups": ("ffn",), "levels": LEVELS, "layers": 3, "values": values, "chosen": {(1, "ffn"): 0.9},
        "importance": [0.1, 0.3, 0.2], "unit": "nats", "caption": ("costs $5 and $6", "word " * 40),
    }  # fmt: skip
    return heatmap.HeatMap(**plain | changes)


def test_what_the_picture_shows(tmp_path: Path) -> None:
    """Values and importance in the cells, sparsity upwards, a box around the choice, the caption wrapped and as it is."""
    panel, strip, bar = (figure := heatmap.figure_of(picture())).axes
    assert panel.collections[0].get_array().tolist() == [[-0.1, -0.1, -0.1], [0, 0.2, 0.4]]
    assert strip.collections[0].get_array().tolist() == [[0.1, 0.3, 0.2]]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["0.5", "0.9"]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0", "1", "2"]
    assert [box.get_xy() for box in panel.patches] == [(1, 1)], "layer 1, the upper row"
    assert panel.get_ylabel() == "sparsity" and strip.get_xlabel() == "decoder layer"
    shades = panel.collections[0].cmap(panel.collections[0].norm([0, 0.2, 0.4]))[:, :3].mean(1)
    assert shades[0] > shades[1] + 0.1 > shades[2] + 0.2, "darker is more, in grey too"
    texts = [text.get_text() for text in figure.texts]
    assert any(text.strip().startswith("costs $5 and $6\nword") and text.count("word\n") >= 2 for text in texts)
    assert "Sensitivity to sparsity by layer" in texts and bar.get_xlabel() == "nats (square-root scale)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["chosen; a layer without a box stays dense"]
    for name in ("one.png", "two.png"):
        heatmap.draw(picture(), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]


def test_a_picture_of_many_layers_and_of_nothing(tmp_path: Path) -> None:
    many = picture(layers=80, values={(n, "ffn"): {0.5: 0.0, 0.9: 0.0} for n in range(80)}, importance=[0.0] * 80)
    panel = heatmap.figure_of(many).axes[0]
    assert [label.get_text() for label in panel.get_xticklabels()] == [str(n) for n in range(0, 80, 5)]
    heatmap.draw(many, tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > 5000


def test_matplotlib_is_asked_for_first(
    tiny: Tiny, tmp_path: Path, alone: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heatmap, "find_spec", lambda name: None)
    config = tiny.config_file(tmp_path / "run.json", "single", tmp_path / "run")
    assert "needs matplotlib, which is not installed: pip install 'sparselora-dist[report]'" in refusal(
        capsys, words(config, tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_two_ranks_measure_the_same(engine: str, tiny: Tiny, single: Path, work: Path) -> None:
    config = tiny.config_file(work / f"{engine}.json", engine, work / "run", sparse_lora={"start_step": 0})
    starters = {
        "zero3": ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--module", "sparselora_dist.cli"],
        "fsdp2": ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "sparselora_dist.cli"],
    }
    run_launch([*starters[engine], *words(config, work / engine)], timeout=400)
    ours, theirs = curves_of(work / engine), curves_of(single)
    assert losses_of(ours) == pytest.approx(losses_of(theirs), abs=LOSS_TOLERANCE)
    assert ours["layer_importance"] == pytest.approx(theirs["layer_importance"], abs=1e-6)
    assert ours["choice"]["layers"] == theirs["choice"]["layers"]
    assert ours["flops"] == theirs["flops"] and ours["data_sha256"] == theirs["data_sha256"]


def test_killed_and_continued(tiny: Tiny, single: Path, work: Path, alone: None) -> None:
    output, record = work / "killed", work / "killed" / "measurements.jsonl"
    config = str(work / "single.json")
    process = subprocess.Popen(
        [sys.executable, "-m", "sparselora_dist.cli", *words(config, output)],
        cwd=ROOT,
        env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not record.is_file() or record.read_bytes().count(b"\n") < 6):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = record.read_bytes()
    # Should it have been too quick for us: as if it had been killed there.
    kept = b"".join(before.splitlines(keepends=True)[:9])
    record.write_bytes(kept + b'{"measured": "layer 2 ff')
    for name in ("curves.json", "sparse_lora.json", "sensitivity.png"):
        (output / name).unlink(missing_ok=True)
    assert kept.count(b"\n") >= 6
    assert main(words(config, output)) == 0
    assert record.read_bytes().startswith(kept), "nothing is measured twice"
    assert record.read_bytes() == (single / "measurements.jsonl").read_bytes()
    assert curves_of(output) == curves_of(single)


def test_another_target_only_chooses_again(
    tiny: Tiny, single: Path, work: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparselora_dist.quality import calibrate as module

    output = work / "again"
    output.mkdir()
    (output / "measurements.jsonl").write_bytes((single / "measurements.jsonl").read_bytes())
    probes: list[Any] = []
    plain = module.Prober.loss
    monkeypatch.setattr(module.Prober, "loss", lambda self, keep: (probes.append(keep), plain(self, keep))[1])
    again = words(str(work / "single.json"), output)
    again[again.index("0.6")] = "0.7"
    assert main(again) == 0
    assert len(probes) == 1 and probes[0], "only the new choice as a whole"
    chosen = curves_of(output)["flops"]["chosen_share"]
    assert curves_of(single)["flops"]["chosen_share"] < chosen <= 0.7


def test_a_given_adapter_is_measured_with_and_its_record_is_its_own(
    tiny: Tiny, single: Path, work: Path, alone: None, capsys: pytest.CaptureFixture
) -> None:
    make_adapter(work / "adapter", Path(tiny.model), target_modules=["q_proj", "down_proj"], r=4, lora_alpha=8)
    lora = {"init_from": str(work / "adapter")}
    config = tiny.config_file(work / "started.json", "single", work / "run", lora=lora, sparse_lora={"start_step": 0})
    own = [*words(config, work / "started"), "--groups", "ffn"]
    assert main(own) == 0
    assert abs(curves_of(work / "started")["dense_loss"] - curves_of(single)["dense_loss"]) > 1e-3
    assert main(words(str(work / "single.json"), work / "started")) == 2
    assert "init_from_sha256" in capsys.readouterr().err


def test_the_output_trains(tiny: Tiny, single: Path, work: Path) -> None:
    """Unchanged, and with the share of FLOPs that was promised for a pass over the data."""
    run = tiny.config("single", work / "trained", train={"max_steps": -1, "num_train_epochs": 1, "save_steps": None})
    run["sparse_lora"] = json.loads((single / "sparse_lora.json").read_text(encoding="utf-8"))
    (work / "trained.json").write_text(json.dumps(run), encoding="utf-8")
    run_launch([sys.executable, "launch/train.py", "--config", str(work / "trained.json")])
    summary = json.loads((work / "trained" / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 8
    assert summary["executed_flops_share"] == pytest.approx(curves_of(single)["flops"]["chosen_share"], abs=1e-9)


# --- what is refused ---------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture, arguments: list[str]) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--target-flops": "0.05"}, r"--target-flops 0.05 cannot be met: .* 0.\d+ to 0.\d+ of dense LoRA's FLOPs"),
        ({"--target-flops": "0.95"}, r"--target-flops 0.95 cannot be met: .*; nothing needs sparsity"),
        ({"--target-flops": "1.5"}, "allowed: a share above 0, below 1"),
        ({"--groups": "ffn,vq"}, r"unknown .*vq.*vo"),
        ({"--groups": "ffn,ffn"}, "allowed: ffn, qk, vo, experts, each once"),
        ({"--levels": "0.5,1"}, "allowed: sparsities above 0, below 1"),
        ({"--levels": "half"}, "'--levels' is 'half'"),
        ({"--rows": "0"}, "'--rows' is 0"),
    ],
)
def test_bad_requests(
    change: dict[str, str], message: str, tiny: Tiny, tmp_path: Path, alone: None, capsys: pytest.CaptureFixture
) -> None:
    import re

    config = tiny.config_file(tmp_path / "run.json", "single", tmp_path / "run")
    arguments = words(config, tmp_path / "out") + [word for pair in change.items() for word in pair]
    assert re.search(message, refusal(capsys, arguments))
    assert not (tmp_path / "out").exists()


def test_data_without_context_tokens(tiny: Tiny, tmp_path: Path, alone: None, capsys: pytest.CaptureFixture) -> None:
    rows = write_rows(tmp_path / "text.jsonl", [{"text": f"every token is trained on {i}"} for i in range(9)])
    config = tiny.config_file(tmp_path / "run.json", "single", tmp_path / "run", data={"train": rows})
    assert "text.jsonl has context tokens" in refusal(capsys, words(config, tmp_path / "out"))


def test_a_record_of_something_else(
    tiny: Tiny, single: Path, tmp_path: Path, alone: None, capsys: pytest.CaptureFixture
) -> None:
    other = tmp_path / "other"
    tiny_base(seed=5, vocab_size=VOCABULARY).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    model = tiny.config_file(tmp_path / "model.json", "single", tmp_path / "run", model={"name_or_path": str(other)})
    error = refusal(capsys, words(model, single))
    assert f"measurements.jsonl was measured on another model ({tiny.model}, " in error and str(other) in error
    data = tiny.config_file(tmp_path / "data.json", "single", tmp_path / "run", data={"train": tiny.eval})
    assert "measurements.jsonl was measured with data_sha256" in refusal(capsys, words(data, single))


def test_model_and_data_instead_of_a_run_file(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = [*OPTIONS, "--output", str(tmp_path)]
    assert "give either --config, or" in refusal(capsys, ["calibrate", *options])
    assert "belong together" in refusal(capsys, ["calibrate", "--model", tiny.model, *options])


def test_a_mixture_of_experts(tiny: Tiny, tmp_path: Path, alone: None) -> None:
    """Its groups are those that its layers have, each measured where it is."""
    model = tmp_path / "mixture"
    tiny_model("qwen3_moe", tiny_config("qwen3_moe", vocab_size=VOCABULARY)).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    config = tiny.config_file(
        tmp_path / "run.json", "single", tmp_path / "run", model={"name_or_path": str(model)}, lora={"r": 4}
    )
    options = ["--target-flops", "0.8", "--levels", "0.75", "--rows", "8", "--output", str(tmp_path / "out")]
    assert main(["calibrate", "--config", config, *options]) == 0
    curves = curves_of(tmp_path / "out")
    assert set(curves["losses"]) == {"qk", "vo", "experts"}
    assert all(set(layers) == {"0", "1", "2", "3"} for layers in curves["losses"].values())
    assert curves["channels"]["experts"] == 32 and curves["flops"]["chosen_share"] <= 0.8
