"""``sparselora-dist losa``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..process import importing, messages

DESCRIPTION = """\
Prune a little, tune, and again: five rounds, in which every layer is given its sparsity and its rank anew (LoSA, arXiv
2502.14816). Adapters keep the zeros.

  sparselora-dist losa --config RUN.json --sparsity 0.5 --output O
  torchrun --nproc-per-node 8 -m sparselora_dist.cli losa --config RUN.json --sparsity 0.5 --output O
  deepspeed --module sparselora_dist.cli losa --config RUN.json --sparsity 0.5 --output O

RUN.json is a run like any other, on the dense model; its steps are dealt to the rounds. O/model is the pruned model in the
end and O/run/adapter the adapter on it. Started again it goes on where it was. losa.json in O says what each round chose.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``losa``."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, metavar="RUN", help="the run, as JSON or YAML")
    parser.add_argument(
        "--sparsity", type=float, required=True, metavar="SHARE", help="of zeros in the end, such as 0.5"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="to be made")
    parser.add_argument("--method", default="wanda", help="magnitude, wanda, ria or sparsegpt (default wanda)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument("--ranks", type=float, nargs=2, default=(6, 10), metavar="R",
                        help="mean rank in the first round and in the last (default 6 10)")  # fmt: skip
    parser.add_argument("--last-share", type=float, default=0.6, metavar="SHARE",
                        help="of the run's steps, what the last round takes (default 0.6)")  # fmt: skip
    parser.add_argument("--data", metavar="FILE_OR_NAME", help="calibration rows (default: the run's data.train)")
    parser.add_argument("--sequences", type=int, default=128, metavar="N", help="calibration sequences (default 128)")
    parser.add_argument("--similar", type=int, default=64, metavar="N",
                        help="those of them that layers are compared by (default 64)")  # fmt: skip
    parser.add_argument(
        "--length", type=int, metavar="N", help="their tokens (default: 2048, or the model's positions)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prune and tune, and say what was written; 0.

    Raises:
        ValueError, OSError: see :func:`sparselora_dist.pruning.losa.losa`.
    """
    with importing():
        from ..config.run import RunConfig
        from ..io.shard_files import read_json
        from ..pruning.losa import LoSA, losa
        from ..train import closing_words
        from ..train import run as train

    messages()
    config = RunConfig.from_file(arguments.config)
    asked = LoSA(
        config=config,
        sparsity=arguments.sparsity,
        output=arguments.output,
        method=arguments.method,
        rounds=arguments.rounds,
        data=arguments.data,
        sequences=arguments.sequences,
        similar=arguments.similar,
        length=arguments.length,
        ranks=tuple(arguments.ranks),
        last_share=arguments.last_share,
    )
    record = losa(asked, train)
    if int(os.environ.get("RANK", 0)) == 0:
        print(_rounds(record))
        last = asked.output / "run"
        print(closing_words(RunConfig.from_file(last / "run.json"), read_json(last / "summary.json")))
    return 0


def _rounds(record: dict[str, Any]) -> str:
    lines = []
    for number, entry in record["rounds"].items():
        shares, ranks, trained = entry["layer_sparsity"], entry["ranks"], entry["trained"]
        what, key = ("training", "train_loss_last") if trained["eval_loss"] is None else ("evaluation", "eval_loss")
        lines.append(
            f"round {number}: zeros {entry['sparsity']:.2%} ({min(shares):.2%} to {max(shares):.2%}), ranks {min(ranks)} to "
            f"{max(ranks)}, {what} loss {trained[key]:.4f}"
        )
    return "\n".join(lines)
