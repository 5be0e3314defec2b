"""Whole runs: every way to start one, what is written down, resuming, bf16, and being told to stop."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparselora_dist.engines.ranks import free_port
from support.compare import assert_close
from support.harness import ROOT, run_launch, run_ranks, without_package
from support.trainer_workers import branch_off, observe
from support.versions import can_nf4, nf4_case

from .conftest import Tiny

# fp32, the same rows summed in another order.
LOSS_TOLERANCE = 1e-4
LAUNCHERS = ("python", "torchrun", "mpirun", "deepspeed")
ENGINES = ("single", "fsdp2", "zero3")
TRACKERS = {"python": '["tensorboard", "mlflow"]', "torchrun": "mlflow", "mpirun": "mlflow"}
IDS = torch.arange(3, 35).reshape(2, 16)
DROPOUT = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}

# Loads adapters with nothing of this project importable; prints nothing, leaves logits.
PLAIN_PEFT = without_package("""
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

model, ids, out, *folders = sys.argv[1:]
logits = {}
for folder in folders:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits[folder] = PeftModel.from_pretrained(base, folder).eval()(input_ids=torch.load(ids)).logits
assert not any(name.startswith("sparselora") for name in sys.modules)
torch.save(logits, out)
""")


def relative(left: float, right: float) -> float:
    return abs(left - right) / abs(right)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def launched(tiny: Tiny, work: Path) -> dict[str, Path]:
    """The same run by all four launchers; their output folders."""
    commands = {
        "python": ("single", ["python"]),
        "torchrun": ("fsdp2", ["torchrun", "--standalone", "--nproc-per-node", "2"]),
        "mpirun": ("zero3", ["mpirun", "-n", "2", "python"]),
        "deepspeed": ("zero3", ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]),
    }
    for name, (engine, command) in commands.items():
        config = tiny.config_file(work / f"{name}.json", engine, work / name)
        tracker = ["--train.report_to", TRACKERS[name], "--train.run_name", name] if name in TRACKERS else []
        store = {"MLFLOW_TRACKING_URI": (work / "mlflow").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
        result = run_launch([*command, "launch/train.py", "--config", config, *tracker], **store)
        (work / f"{name}.out").write_text(result.stdout, encoding="utf-8")
        (work / f"{name}.err").write_text(result.stderr, encoding="utf-8")
    return {name: work / name for name in commands}


@pytest.fixture(scope="module")
def engine_runs(tiny: Tiny, work: Path, launched: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Runs with LoRA dropout, in fp32 and bf16, and the same resumed; runs resumed from another engine's checkpoint."""
    jobs: dict[str, tuple[dict[str, Any], tuple[str, int] | None]] = {}

    def add(name: str, engine: str, origin: tuple[Path, int] | None = None, **sections: dict[str, Any]) -> None:
        sections["train"] = {**sections.get("train", {}), "resume": origin is not None}
        config = tiny.config(engine, work / name, **sections)
        jobs[name] = config, origin and (str(origin[0]), origin[1])

    for engine in ENGINES:
        add(engine, engine, lora=DROPOUT)
        add(f"{engine}-resumed", engine, (work / engine, 2), lora=DROPOUT)
        bf16: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "lora": DROPOUT}
        bf16["train"] = {"max_steps": 12, "learning_rate": 3e-2, "save_steps": 10}
        add(f"{engine}-bf16", engine, **bf16)
        add(f"{engine}-bf16-resumed", engine, (work / f"{engine}-bf16", 10), **bf16)
        coded: dict[str, Any] = {"lora": DROPOUT | {"r": 256}, "train": {"optim": "adamw_8bit"}}
        add(f"{engine}-8bit", engine, **coded)
        add(f"{engine}-8bit-resumed", engine, (work / f"{engine}-8bit", 2), **coded)
        if can_nf4(engine):
            add(f"{engine}-nf4", engine, quantization={"load_in_4bit": True})
            add(f"{engine}-nf4-resumed", engine, (work / f"{engine}-nf4", 2), quantization={"load_in_4bit": True})
    add("zero3-to-single", "single", (launched["mpirun"], 2))
    add("single-to-fsdp2", "fsdp2", (launched["python"], 2))
    add("fsdp2-to-zero3", "zero3", (launched["torchrun"], 2))

    results = {}
    for name, (config, origin) in jobs.items():
        if config["engine"]["name"] == "single":
            if origin:
                branch_off(Path(origin[0]), work / name, origin[1])
            results[name] = observe(config, IDS)
    ranked = {name: job for name, job in jobs.items() if job[0]["engine"]["name"] != "single"}
    ranks = run_ranks("support.trainer_workers:many_runs", 2, list(ranked.values()), IDS)
    return results | {name: {**ranks[0][i], "other": ranks[1][i]} for i, name in enumerate(ranked)}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launched_run_leaves_its_record(launcher: str, launched: dict[str, Path], rows_of: Callable) -> None:
    folder = launched[launcher]
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert {"loss", "grad_norm", "learning_rate", "tokens_per_second_per_gpu"} <= set(row)
        assert any(key.startswith("sparsity/") for key in row)
        assert all(math.isfinite(value) for value in row.values())
    assert [row["sparsity/active"] for row in rows] == [0, 1, 1, 1, 1, 1]
    assert [row["sparsity/context_share"] > 0.3 for row in rows] == [False, True, True, True, True, True]

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["engine"] == {"python": "single", "torchrun": "fsdp2"}.get(launcher, "zero3")
    assert summary["world_size"] == (1 if launcher == "python" else 2)
    assert summary["steps"] == 6
    assert summary["tokens"] == rows[-1]["num_tokens"]
    assert (summary["train_loss_first"], summary["train_loss_last"]) == (rows[0]["loss"], rows[-1]["loss"])
    assert summary["eval_loss"] < summary["eval_loss_start"]
    assert 0 < summary["context_share"] < 1
    assert 0 < summary["executed_flops_share"] < 1


@pytest.mark.parametrize("launcher", LAUNCHERS[1:])
def test_all_launchers_train_alike(launcher: str, launched: dict[str, Path], rows_of: Callable) -> None:
    reference, got = rows_of(launched["python"]), rows_of(launched[launcher])
    for one, other in zip(reference, got, strict=True):
        assert relative(other["loss"], one["loss"]) < LOSS_TOLERANCE, one["step"]
        assert relative(other["grad_norm"], one["grad_norm"]) < 1e-3, one["step"]
        assert other["sparsity/context_share"] == one["sparsity/context_share"]
    for key in ("eval_loss_start", "eval_loss"):
        values = [json.loads((launched[name] / "summary.json").read_text())[key] for name in ("python", launcher)]
        assert relative(values[1], values[0]) < LOSS_TOLERANCE, key
    kept = load_file(launched["python"] / "checkpoint-6" / "ranks.safetensors")
    masks = {name.removeprefix("0/"): mask for name, mask in kept.items() if "/mask/" in name}
    assert sorted(masks) == ["mask/1.ffn.5", "mask/1.qk.5", "mask/2.vo.5"]
    for name, mask in load_file(launched[launcher] / "checkpoint-6" / "ranks.safetensors").items():
        if "/mask/" in name:
            assert torch.equal(mask, masks[name.split("/", 1)[1]]), name


def test_tensorboard_gets_the_rows_when_asked(launched: dict[str, Path], rows_of: Callable) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(launched["python"] / "tensorboard"))
    board.Reload()
    losses = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in board.Scalars("loss")]
    assert losses == [(row["step"], row["loss"]) for row in rows_of(launched["python"])]
    assert "sparsity/active" in board.Tags()["scalars"]
    assert not (launched["torchrun"] / "tensorboard").exists()


@pytest.mark.parametrize("launcher", TRACKERS)
def test_a_second_tracker_gets_the_same_figures(
    launcher: str, launched: dict[str, Path], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow, read back from its own files: one run of each launcher, by rank 0, with settings and every row."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient((work / "mlflow").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'sparselora-dist'")
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(found) == sorted(TRACKERS)
    run = found[launcher]
    assert run.info.status == "FINISHED"
    assert run.data.params["train.learning_rate"] == "0.005"
    assert run.data.params["sparse_lora.layers.ffn.1-2"] == "0.7"
    rows = [json.loads(line) for line in (launched[launcher] / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "num_tokens", "sparsity/context_share", "eval_loss", "eval_exact_match"):
        history = client.get_metric_history(run.info.run_id, name)
        assert [(point.step, point.value) for point in history] == [
            (row["step"], row[name]) for row in rows if name in row
        ], name


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_the_terminal_says(launcher: str, launched: dict[str, Path], work: Path) -> None:
    folder, out = launched[launcher], (work / f"{launcher}.out").read_text()
    err = (work / f"{launcher}.err").read_text() + out
    summary = json.loads((folder / "summary.json").read_text())
    assert out.count(f"loss {summary['eval_loss_start']:.4f} -> {summary['eval_loss']:.4f}") == 1
    assert f"{summary['executed_flops_share']:.1%} of plain LoRA's FLOPs" in out
    assert out.count(f"sparselora-dist inspect {folder}\n") == 1
    merge = next(line for line in out.splitlines() if "sparselora-dist merge" in line)
    assert f"--adapter {folder}/adapter --output {folder}/merged --dtype float32" in merge
    assert err.count(f"step 0: eval_loss {summary['eval_loss_start']:.4f}, token accuracy") == 1
    assert err.count(f"step 6: eval_loss {summary['eval_loss']:.4f}, token accuracy") == 1
    assert "FutureWarning" not in err


def test_the_adapter_can_be_pushed_as_it_is(tiny: Tiny, launched: dict[str, Path], work: Path) -> None:
    """Tokenizer and model card, as PEFT's and TRL's users expect."""
    from huggingface_hub import ModelCard
    from transformers import AutoTokenizer

    folder = launched["torchrun"] / "adapter"
    text = "say abc: "
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(tiny.model)(text)
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert (data["base_model"], data["library_name"], data["pipeline_tag"]) == (tiny.model, "peft", "text-generation")
    assert {"lora", "sparselora"} <= set(data["tags"])
    assert "license" not in data
    summary = json.loads((launched["torchrun"] / "summary.json").read_text())
    for line in (
        f"| evaluation loss, nats per label token | {summary['eval_loss_start']:.4f} | {summary['eval_loss']:.4f} |",
        f"| tokens computed sparsely | {summary['context_share']:.1%} |",
        f"| data | `{tiny.train}` |",
        "| sparsity of ffn | layers 1-2: 0.7 |",
        "| batch | 2 rows x 2 accumulated x 2 ranks |",
        "| engine | fsdp2, 2 ranks |",
    ):
        assert line in card.text, line
    assert "{{" not in card.text and "None" not in card.text
    assert not list((launched["torchrun"]).glob("checkpoint-*/adapter/README.md"))


@pytest.mark.parametrize("engine", [nf4_case(engine, engine) for engine in ENGINES])
def test_nf4_runs_agree_resume_and_keep_less(
    engine: str, work: Path, engine_runs: dict[str, dict[str, Any]], launched: dict[str, Path], rows_of: Callable
) -> None:
    rows = rows_of(work / f"{engine}-nf4")
    for one, other in zip(rows_of(work / "single-nf4"), rows, strict=True):
        assert relative(other["loss"], one["loss"]) < LOSS_TOLERANCE, one["step"]
    resumed = rows_of(work / f"{engine}-nf4-resumed")
    assert [row["loss"] for row in resumed] == [row["loss"] for row in rows]
    folders = (launched["python"], work / "single-nf4", work / f"{engine}-nf4")
    plain, single, mine = (json.loads((folder / "summary.json").read_text()) for folder in folders)
    assert mine["eval_loss"] < mine["eval_loss_start"]
    assert set(plain["load"]) == {"seconds", "kept_bytes", "host_peak_bytes", "device_peak_bytes"}
    kept = single["load"]["kept_bytes"]
    assert kept < 0.5 * plain["load"]["kept_bytes"]
    assert mine["load"]["kept_bytes"] == pytest.approx(kept if engine == "single" else kept / 2, rel=0.02)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_checkpoints_hold_the_adapter_and_no_code(launcher: str, launched: dict[str, Path]) -> None:
    folder = launched[launcher]
    assert sorted(path.name for path in folder.glob("*checkpoint-*")) == [f"checkpoint-{step}" for step in (2, 4, 6)]
    files = [path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    files.remove(folder / "adapter" / "README.md")
    assert {path.suffix for path in files} == {".json", ".jsonl", ".safetensors"}
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    elements = sum(tensor.numel() for tensor in adapter.values())
    moments = load_file(folder / "checkpoint-6" / "optimizer.safetensors")
    assert all("lora_" in name for name in [*adapter, *moments])
    assert sum(tensor.numel() for tensor in moments.values()) == 2 * elements
    # Adapter and two moments in fp32, random states of two ranks, and some text: far less than the base model.
    size = sum(path.stat().st_size for path in (folder / "checkpoint-6").rglob("*") if path.is_file())
    assert size < 3 * 4 * elements + 40_000


def test_the_deepspeed_launcher_needs_no_flags(tiny: Tiny, work: Path, rows_of: Callable) -> None:
    config = tiny.config_file(work / "bare.json", "zero3", work / "bare", train={"max_steps": 2, "save_steps": None})
    # The port is only there because other jobs of this machine may use the default one.
    run_launch(["deepspeed", "--master_port", str(free_port()), "launch/train.py", "--config", config])
    assert len(rows_of(work / "bare")) == 2
    assert json.loads((work / "bare" / "summary.json").read_text())["world_size"] >= 1


def test_plain_peft_gives_the_trained_models_logits(
    tiny: Tiny, work: Path, launched: dict[str, Path], engine_runs: dict[str, dict[str, Any]]
) -> None:
    torch.save(IDS, work / "ids.pt")
    names = [*ENGINES, *(f"{engine}-bf16" for engine in ENGINES)]
    folders = [str(work / name / "adapter") for name in names] + [str(path / "adapter") for path in launched.values()]
    command = [sys.executable, "-c", PLAIN_PEFT, tiny.model, str(work / "ids.pt"), str(work / "logits.pt"), *folders]
    subprocess.run(command, check=True, cwd=work, timeout=120)
    logits = torch.load(work / "logits.pt")
    for name in names:
        trained, got = engine_runs[name]["logits"], logits[str(work / name / "adapter")]
        if name.endswith("bf16"):
            # Compared with the adapter on the fp32 base: 8 bits, over three layers.
            assert (got - trained).norm() < 0.05 * got.norm(), name
        else:
            assert_close(name, trained, got, 1e-4, 1e-4)
    base, *others = (logits[str(path / "adapter")] for path in launched.values())
    for name, other in zip(LAUNCHERS[1:], others, strict=True):
        assert_close(name, base, other, 1e-3, 1e-3)


def test_engines_choose_the_same_masks(engine_runs: dict[str, dict[str, Any]], launched: dict[str, Path]) -> None:
    for name in ("fsdp2", "zero3", "single-to-fsdp2", "fsdp2-to-zero3"):
        mine, other = engine_runs[name]["masks"], engine_runs[name]["other"]["masks"]
        for one, two in zip(mine, other, strict=True):
            assert one.keys() == two.keys()
            assert all(torch.equal(one[key], two[key]) for key in one)
    reference = engine_runs["zero3-to-single"]["masks"]
    assert all(set(masks) == {(1, "ffn"), (1, "qk"), (2, "vo")} for masks in reference)
    for name in ("single-to-fsdp2", "fsdp2-to-zero3"):
        for one, two in zip(reference, engine_runs[name]["masks"], strict=True):
            assert all(torch.equal(one[key], two[key]) for key in one), name


@pytest.mark.parametrize("dtype", ["", "-bf16", "-8bit"])
@pytest.mark.parametrize("engine", ENGINES)
def test_resume_is_bit_identical(
    engine: str, dtype: str, work: Path, engine_runs: dict[str, dict[str, Any]], rows_of: Callable
) -> None:
    name = engine + dtype
    whole, resumed = rows_of(work / name), rows_of(work / f"{name}-resumed")
    for key in ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "sparsity/context_share"):
        assert [row[key] for row in resumed] == [row[key] for row in whole], key
    first, second = (load_file(work / n / "adapter" / "adapter_model.safetensors") for n in (name, f"{name}-resumed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    masks, masks_resumed = engine_runs[name]["masks"], engine_runs[f"{name}-resumed"]["masks"]
    for one, two in zip(masks[-len(masks_resumed) :], masks_resumed, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    summaries = [engine_runs[n]["summary"] for n in (name, f"{name}-resumed")]
    for key in ("tokens", "train_loss_first", "train_loss_last", "eval_loss_start", "eval_loss", "context_share"):
        assert summaries[0][key] == summaries[1][key], key


@pytest.mark.parametrize(
    ("name", "origin"), [("zero3-to-single", "mpirun"), ("single-to-fsdp2", "python"), ("fsdp2-to-zero3", "torchrun")]
)
def test_resume_at_another_engine_or_world_size(
    name: str, origin: str, work: Path, launched: dict[str, Path], engine_runs: dict[str, Any], rows_of: Callable
) -> None:
    whole, resumed = rows_of(launched[origin]), rows_of(work / name)
    assert [row["step"] for row in resumed] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(whole[2:], resumed[2:], strict=True):
        assert relative(other["loss"], one["loss"]) < LOSS_TOLERANCE, one["step"]
        assert other["learning_rate"] == pytest.approx(one["learning_rate"], rel=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_trains(engine: str, work: Path, engine_runs: dict[str, Any], rows_of: Callable) -> None:
    losses = [row["loss"] for row in rows_of(work / f"{engine}-bf16")]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    summary = engine_runs[f"{engine}-bf16"]["summary"]
    assert summary["eval_loss"] < 0.8 * summary["eval_loss_start"]


def test_sigterm_saves_a_checkpoint_that_continues(tiny: Tiny, work: Path, alone: None, rows_of: Callable) -> None:
    train = {"max_steps": 5000, "save_steps": None, "eval_steps": None}
    config = tiny.config_file(work / "stopped.json", "single", work / "stopped", train=train)
    command = [sys.executable, "launch/train.py", "--config", config]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics, deadline = work / "stopped" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and len(rows_of(work / "stopped")) >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, -signal.SIGTERM)
    (saved,) = (work / "stopped").glob("checkpoint-*")
    step = int(saved.name.split("-")[1])
    assert f"saved checkpoint-{step}" in errors
    assert [row["step"] for row in rows_of(work / "stopped")] == list(range(1, step + 1))
    assert not (work / "stopped" / "adapter").exists()

    settings = {**train, "max_steps": step + 2, "resume": True}
    summary = observe(tiny.config("single", work / "stopped", train=settings), IDS)["summary"]
    assert summary["steps"] == step + 2
    assert [row["step"] for row in rows_of(work / "stopped")] == list(range(1, step + 3))
