"""Provokes the faults that a run on a cluster meets, and says of each what was seen, and how long it took.

    python benchmarks/faults.py --output benchmarks/results/faults.md          # all
    python benchmarks/faults.py --only F8 F9 --engines fsdp2

A fault of running processes (F7 to F12) is provoked in a real run of two ranks (``fault_rank.py``); *survived* means: every
process ends, or the run goes on, within the heartbeat's timeout and some seconds; the error names the rank with its host and
phase, or the file; and the run that continues has the losses of one that nothing happened to, bit for bit. F1 to F6, and bad
input (B1 to B10), are tests of the suite: their row says which.

F9 needs root, for network namespaces; its row says that it was skipped elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Hosts on one machine are made for tests and benchmarks in one place.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "lib"))

from support.networks import DEVICE, Network, reason_against, two_networks

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
HEARTBEAT = 6.0
SLACK = 35.0
"""Beyond the heartbeat's timeout: what a launcher takes to end, loading again in F7."""
STEPS, SAVE = 8, 3
TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node", "2")
RANK_1 = r"rank 1 \(\S+, process \d+\) "


@dataclass(frozen=True)
class Fault:
    """A fault of a running process.

    ``words`` are fault_rank.py's; ``said`` must be in the output; ``told`` is sent to the launcher when the fault's phase is
    reached.
    """

    number: str
    what: str
    words: str
    said: str
    told: signal.Signals | None = None
    launcher: tuple[str, ...] = TORCHRUN
    goes_on: bool = False
    """Whether the same command finishes the run."""
    hosts: bool = False
    """Whether the ranks are on two hosts (network namespaces)."""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tested:
    """A fault, or bad input, that tests of the suite provoke."""

    number: str
    what: str
    tests: tuple[str, ...]


MASKS = "tests/sync/test_masks.py::test_"
REFUSALS = "tests/integration/test_refusals.py::test_"
RESUME = "tests/integration/test_refused_resume.py::test_"
DATA = "tests/integration/test_refused_data.py::test_"
FACTORS = "tests/apply/test_factor_files.py::test_"
TABLE: tuple[Fault | Tested, ...] = (
    Tested("F1", "a rank skips a layer's mask sync", (f"{MASKS}a_skipped_sync_names_both_ranks_and_layers",)),
    Tested("F2", "activation checkpointing, all three", (f"{MASKS}checkpointing_changes_nothing",)),
    Tested("F3", "one rank has no context tokens", (f"{MASKS}a_rank_with_nothing_to_score_takes_part",)),
    Tested("F4", "accumulation, rows without labels", (f"{DATA}a_micro_batch_without_labels_beside_one_with",)),
    Tested("F5", "all scores tied, 4 ranks", (f"{MASKS}ties_break_the_same_way_everywhere",)),
    Tested("F6", "NaN or Inf scores on one rank", (f"{MASKS}non_finite_scores_of_one_rank_stop_all",)),
    Fault(
        "F7", "SIGKILL of a rank, restarts allowed", "kill 1 backward of step 5", f"{RANK_1}is gone .* backward of step 5",
        launcher=(*TORCHRUN, "--max-restarts", "2"), goes_on=True,
    ),
    Fault("F8", "SIGSTOP of a rank in backward", "stop 1 backward of step 5", f"{RANK_1}has not .* backward of step 5"),
    Fault(
        "F8", "SIGSTOP of a rank in evaluation", "stop 1 evaluation at step 4", f"{RANK_1}has not .* evaluation at step 4"
    ),
    Fault(
        "F9", "link between two hosts cut", "cut 1 backward of step 5", f"{RANK_1}has not .* backward of step 5",
        hosts=True,
    ),
    Fault(
        "F10", "SIGKILL between writing and publishing", "torn 0 saving of checkpoint-6",
        r"rank 0 \(\S+, process \d+\) is gone",
    ),
    Fault(
        "F10", "disk full", "full 0 saving of checkpoint-6", r"could not save \S+checkpoint-6: File too large \(it needs"
    ),
    Fault(
        "F11", "SIGTERM in training", "slow all forward of step 5", r"SIGTERM: saved checkpoint-\d+ in ",
        told=signal.SIGTERM,
    ),
    Fault(
        "F11", "SIGTERM in the last evaluation", "slow all evaluation at step 8", "SIGTERM: saved checkpoint-8 in ",
        told=signal.SIGTERM,
    ),
    Fault("F12", "out of memory on one rank", "memory 1 optimizer of step 5", r"OutOfMemoryError(.|\n)*\(rank 1 failed\)"),
    Fault("N11", "a gradient is NaN, its loss is not", "nan 1 backward of step 5", "gradients of step 5 are not finite"),
    Tested("B1", "truncated factor file", ("tests/integration/test_refused_factors.py::test_a_truncated_factor_file",)),
    Tested("B2", "factor file with a flipped bit", (f"{FACTORS}a_damaged_factor_file_is_refused_by_name",)),
    Tested("B3", "factors of another model, rank or dtype", (f"{FACTORS}factors_of_another_model_rank_or_dtype",)),
    Tested("B4", "swapped or missing factor, with a fitting hash", (f"{FACTORS}what_a_fitting_hash_does_not_vouch_for",)),
    Tested("B5", "a pickle given as factors", (f"{FACTORS}a_pickle_is_never_loaded",)),
    Tested("B6", "a model folder that brings code, `y` on standard input", (f"{REFUSALS}a_model_that_brings_code",)),
    Tested(
        "B7", "unknown key, sparsity out of range, a range that matches nothing",
        tuple(f"{REFUSALS}{name}" for name in (
            "an_unknown_key_with_the_nearest", "a_sparsity_outside_zero_to_one", "a_range_that_the_model_does_not_have"
        )),
    ),
    Tested(
        "B8", "a path that leaves its folder",
        ("tests/io/test_factors.py::test_an_index_cannot_name_files_outside_its_folder",),
    ),
    Tested(
        "B9", "checkpoints that are gone or damaged",
        ("tests/io/test_run_folder.py::test_auto_where_checkpoints_are_gone", f"{RESUME}resume_of_a_damaged_checkpoint"),
    ),
    Tested("B10", "resume with another global batch", (f"{RESUME}resume_with_another_global_batch",)),
    Tested("N1", "two runs in one folder", (f"{REFUSALS}two_runs_in_one_folder",)),
    Tested("N3", "rows longer than the model reaches", (f"{DATA}rows_longer_than_the_model_reaches",)),
    Tested(
        "N4", "resume with other settings, data or weights",
        (f"{RESUME}resume_with_other_settings", f"{RESUME}resume_with_other_data_or_weights"),
    ),
    Tested("N13", "an abandoned branch is not continued", (f"{RESUME}an_abandoned_branch_is_not_continued",)),
    Tested("N14", "ranks that differ", (f"{REFUSALS}ranks_that_differ",)),
    Tested("N16", "a finished folder", (f"{RESUME}a_finished_folder",)),
)  # fmt: skip


def run_file(folder: Path, engine: str, name: str, settings: dict[str, Any]) -> Path:
    """The embedded demo model on a few rows, for some steps."""
    path = folder / f"{name}.json"
    run = {
        "model": {"name_or_path": str(ROOT / "demo/model"), "dtype": "float32"},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "sparse_lora": {"start_step": 1, "layers": {"ffn": {"1-4": 0.9}}},
        "data": {"train": str(ROOT / "demo/data/train.jsonl"), "train_limit": 64, "packing": False, "max_length": 96,
                 "eval": str(ROOT / "demo/data/eval.jsonl"), "eval_limit": 12},
        "train": {"output_dir": str(folder / name), "max_steps": STEPS, "save_steps": SAVE, "eval_steps": 4,
                  "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "disable_tqdm": True,
                  "resume": "auto", "heartbeat_timeout": HEARTBEAT} | settings,
        "engine": {"name": engine},
    }  # fmt: skip
    path.write_text(json.dumps(run))
    return path


def alive(config: Path) -> list[int]:
    """Processes with this run file, but for zombies."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if str(config) in words and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(entry.name))
    return found


def start(launcher: tuple[str, ...], config: Path, fault: str, hosts: Sequence[Network] | None = None) -> Any:
    """The processes that were started, by a launcher or a rank on each host, and the file of what they say."""
    mark, log = config.with_suffix(".once"), config.with_suffix(".log")
    mark.unlink(missing_ok=True)
    path = f"{BIN}:{os.environ['PATH']}"
    env = {**os.environ, "FAULT": fault, "FAULT_ONCE": str(mark), "FAULT_LINK": DEVICE, "PATH": path,
           "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    script = ["benchmarks/fault_rank.py", "--config", str(config)]
    options: dict[str, Any] = {"cwd": ROOT, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    with open(log, "wb") as out:
        if hosts is None:
            return [
                subprocess.Popen([str(BIN / launcher[0]), *launcher[1:], *script], env=env, stdout=out, **options)
            ], log
        job = {"WORLD_SIZE": "2", "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": DEVICE,
               "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # fmt: skip
        return [
            subprocess.Popen(
                [*host.words, sys.executable, *script], env=env | job | {"RANK": str(rank)}, stdout=out, **options
            )
            for rank, host in enumerate(hosts)
        ], log


def wait(until: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def losses(folder: Path) -> list[tuple[float, float]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row.get("loss", row.get("eval_loss"))) for row in rows]


def provoke(fault: Fault, engine: str, folder: Path, whole: list[tuple[float, float]]) -> tuple[str, str, float, str]:
    """Verdict, seconds from the fault until it was said and until all had ended (or the run was done), and the line."""
    name = re.sub(r"\W+", "-", f"{fault.number}-{engine}-{fault.words}")
    config = run_file(folder, engine, name, fault.settings)
    with ExitStack() as stack:
        hosts = stack.enter_context(two_networks()) if fault.hosts else None
        processes, log = start(fault.launcher, config, fault.words, hosts)
        stack.callback(lambda: [os.kill(pid, signal.SIGKILL) for pid in alive(config)])
        mark = config.with_suffix(".once")
        if not wait(mark.exists, 240):
            return "the fault did not happen", "", 0.0, log.read_text()[-300:]
        if fault.told:
            time.sleep(0.5)
            processes[0].send_signal(fault.told)
        began, named = time.monotonic(), ""

        def over() -> bool:
            nonlocal named
            if not named and re.search(fault.said, log.read_text(errors="replace")):
                named = f"{time.monotonic() - began:.1f}"
            return not alive(config) and all(p.poll() is not None for p in processes)

        ended = wait(over, HEARTBEAT + SLACK + 60)
        seconds = time.monotonic() - began
    text = log.read_text(errors="replace")
    found = re.search(fault.said, text)
    line = text[found.start() :].splitlines()[0] if found else ""
    problems = [] if ended else ["processes were left"]
    if not found:
        problems.append("not named")
    if fault.goes_on != (processes[0].returncode == 0):
        problems.append(f"status {processes[0].returncode}")
    if not fault.goes_on:
        processes, log = start(TORCHRUN, config, "none all never")
        if not wait(lambda: processes[0].poll() is not None, 240) or processes[0].returncode:
            problems.append("does not resume")
    if losses(folder / name) != whole:
        problems.append("other losses")
    return "; ".join(problems) or "survived", named, seconds, line


def tested(case: Tested) -> tuple[str, float, str]:
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *case.tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"})
    word = "held" if done.returncode == 0 else "fell"
    return word, time.monotonic() - began, ", ".join(f"`{name}`" for name in case.tests)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="numbers, such as F8")
    parser.add_argument("--engines", nargs="+", default=["fsdp2", "zero3"], choices=["fsdp2", "zero3"])
    parser.add_argument("--output", type=Path, help="write the table here too")
    options = parser.parse_args()
    rows = ["| | fault | engine | verdict | said, s | ended, s | what was said |", "|---|---|---|---|---:|---:|---|"]
    print("\n".join(rows), flush=True)
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder, whole = Path(name), {}
        for case in TABLE:
            if options.only and case.number not in options.only:
                continue
            for engine in options.engines if isinstance(case, Fault) else ["both"]:
                named = ""
                if isinstance(case, Tested):
                    verdict, seconds, said = tested(case)
                elif case.hosts and (reason := reason_against()):
                    verdict, seconds, said = f"skipped: {reason}", 0.0, ""
                else:
                    if engine not in whole:
                        config = run_file(folder, engine, f"whole-{engine}", {})
                        processes, log = start(TORCHRUN, config, "none all never")
                        if processes[0].wait(600):
                            raise SystemExit(log.read_text()[-3000:])
                        whole[engine] = losses(folder / f"whole-{engine}")
                    verdict, named, seconds, said = provoke(case, engine, folder, whole[engine])
                bad += verdict not in ("survived", "held")
                said = said.replace("|", "\\|").replace(f"{folder}/", "")
                rows.append(
                    f"| {case.number} | {case.what} | {engine} | {verdict} | {named} | {seconds:.1f} | {said} |"
                )
                print(rows[-1], flush=True)
    if options.output:
        words = " ".join(["python benchmarks/faults.py", *sys.argv[1:]])
        head = f"# Faults, provoked\n\n`{words}`; two ranks on one CPU machine, `train.heartbeat_timeout` {HEARTBEAT:g} s. "
        head += (
            "Seconds: from the fault until it was said, and until every process had ended (F7: the run was done).\n\n"
        )
        options.output.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
