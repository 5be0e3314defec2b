"""What does a rank hold while it loads, and how long does loading take?

    python benchmarks/streaming_load.py [--gigabytes 1.2] [--ways "zero3 nf4" ...] [--json]

Makes a Llama of random weights (bf16, several safetensors files), loads it on 2 ranks under each engine, plain and in
formats, and watches every rank's resident memory from outside, file pages included. The limit beside it: the rank's part
after encoding, 15 % of the checkpoint, and what the process held before the load. Two loads that are not ours give the
times to compare with: ``from_pretrained`` of the whole model with its values in memory (as sharding needs them; without
that it only maps the files), and ``from_pretrained`` with bitsandbytes' NF4. All loads are of 2 processes at once, one
thread each, files cached.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparselora_dist.engines.ranks import free_port

# The repository keeps its root off sys.path, and with it the folder of the script.
sys.path.append(str(Path(__file__).resolve().parent))

RANKS = 2
STORAGES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "nf4": {"load_in_4bit": True},
    "fp8": {"format": "fp8"},
    "hqq4": {"format": "hqq", "bits": 4},
    "bcq3": {"format": "bcq", "bits": 3},
}
"""By name, the ``quantization`` section."""
WAYS = tuple(f"{engine} {storage}" for engine in ("zero3", "fsdp2") for storage in STORAGES)
OTHERS = ("from_pretrained", "from_pretrained nf4")


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """A checkpoint of about that size, written a layer at a time."""
    import torch
    from safetensors.torch import save_file
    from shapes import SHAPES, hf_config

    shape = SHAPES["1b"]
    matrices = {name: shape.matrix(f"{name}_proj") for name in ("q", "k", "v", "o", "gate", "up", "down")}
    layer_bytes = 2 * sum(rows * columns for rows, columns in matrices.values())
    ends_bytes = 2 * 2 * shape.vocabulary * shape.hidden
    shape = replace(shape, layers=max(1, round((gigabytes * 1e9 - ends_bytes) / layer_bytes)))
    hf_config(shape, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(folder)
    part = {
        "model.embed_tokens.weight": (shape.vocabulary, shape.hidden),
        "lm_head.weight": (shape.vocabulary, shape.hidden),
        "model.norm.weight": (shape.hidden,),
    }
    files: dict[str, str] = {}
    for number in range(-1, shape.layers):
        if number >= 0:
            at = f"model.layers.{number}."
            part = {
                **{f"{at}{'self_attn' if n in 'qkvo' else 'mlp'}.{n}_proj.weight": matrices[n] for n in matrices},
                **{f"{at}{n}_layernorm.weight": (shape.hidden,) for n in ("input", "post_attention")},
            }
        name = f"model-{number + 2:05}-of-{shape.layers + 1:05}.safetensors"
        tensors = {key: torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02) for key, size in part.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        files |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def worker(way: str, folder: Path, out: Path) -> None:
    """One rank: says when it is ready, loads, says what it kept and how long it took."""
    import torch

    rank, kept = os.environ["RANK"], 0
    if way in WAYS:
        import torch.distributed as dist

        from sparselora_dist.config import RunConfig
        from sparselora_dist.engines import make_engine
        from sparselora_dist.io.load import load_base

        name, storage = way.split()
        config = RunConfig.from_dict(
            {
                "model": {"name_or_path": str(folder), "dtype": "bfloat16"},
                "quantization": STORAGES[storage],
                "data": {"train": "none"},
                "train": {"output_dir": str(out)},
                "engine": {"name": name},
            }
        )
        engine = make_engine(config)
        placement = engine.placement()
        import bitsandbytes  # noqa: F401

        dist.barrier()
        (out / f"{rank}.ready").touch()
        time.sleep(0.5)
        base = load_base(config.model, config.quantization, placement, local_ranks=RANKS)
        seconds, kept = base.report.seconds, base.report.kept_bytes
    else:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        options: dict[str, Any] = {"dtype": torch.bfloat16}
        if way.endswith("nf4"):
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            )
        (out / f"{rank}.ready").touch()
        time.sleep(0.5)
        started = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)
        for p in model.parameters():
            p.data = p.data.clone()
        seconds = time.perf_counter() - started
    (out / f"{rank}.json").write_text(json.dumps({"seconds": seconds, "kept": kept}))
    sys.stdout.flush()
    os._exit(0)  # See launch/train.py.


def resident(pid: int) -> int:
    """Resident bytes of a process, mapped files included; 0 once it has gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0)


def measure(way: str, folder: Path) -> dict[str, float]:
    """Load one way; the worst rank's figures."""
    with tempfile.TemporaryDirectory() as out:
        env = {**os.environ, "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONSAFEPATH": "1"}
        ranks = []
        with open(Path(out) / "log.txt", "wb") as log:
            for rank in range(RANKS):
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, __file__, "--worker", way, str(folder), out],
                        env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
            base, peak = [0] * RANKS, [0] * RANKS
            while any(process.poll() is None for process in ranks):
                for rank, process in enumerate(ranks):
                    now = resident(process.pid)
                    if not base[rank] and (Path(out) / f"{rank}.ready").exists():
                        base[rank] = now
                    peak[rank] = max(peak[rank], now)
                time.sleep(0.01)
        reports = [Path(out) / f"{rank}.json" for rank in range(RANKS)]
        if not all(path.is_file() for path in reports):
            raise SystemExit(f"{way} failed:\n{(Path(out) / 'log.txt').read_text()[-3000:]}")
        said = [json.loads(path.read_text()) for path in reports]
    return {
        "seconds": max(one["seconds"] for one in said),
        "kept": max(one["kept"] for one in said),
        "base": max(base),
        "peak": max(peak),
    }


def run(gigabytes: float, ways: list[str]) -> dict[str, Any]:
    """These ways on one checkpoint; sizes in bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder, gigabytes)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        rows = {way: measure(way, folder) for way in ways}
    for way in set(WAYS).intersection(ways):
        rows[way]["limit"] = rows[way]["kept"] + 0.15 * size + rows[way]["base"]
    return {"checkpoint": size, "ranks": RANKS, "ways": rows}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.2)
    parser.add_argument("--ways", nargs="+", default=[*WAYS, *OTHERS], choices=[*WAYS, *OTHERS], metavar="WAY")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = run(options.gigabytes, options.ways)
    if options.json:
        return print(json.dumps(result))
    print(f"Checkpoint of {result['checkpoint'] / 1e9:.2f} GB, {RANKS} ranks.\n")
    print("| load | seconds | kept a rank, MB | peak resident, MB | limit, MB | before the load, MB |")
    print("|---|---|---|---|---|---|")
    for way, row in result["ways"].items():
        kept, limit = (f"{row[key] / 1e6:,.0f}" if row.get(key) else "" for key in ("kept", "limit"))
        print(
            f"| {way} | {row['seconds']:.2f} | {kept} | {row['peak'] / 1e6:,.0f} | {limit} | {row['base'] / 1e6:,.0f} |"
        )


if __name__ == "__main__":
    main()
