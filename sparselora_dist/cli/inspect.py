"""``sparselora-dist inspect``: how well the estimator chooses on your data, and a report of a run; a model's zeros, and
its storage."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..config.errors import ConfigError
from ..io.manifest import write_text
from ..process import importing

FIDELITY_FILE = "fidelity.json"
REPORT_FILE = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``sparselora-dist inspect``."""
    parser.add_argument("target", metavar="RUN_DIR_OR_MODEL", help="a run's output_dir, or a model with --config")
    parser.add_argument("--config", metavar="RUN.json", help="what is sparse, and the data; else the run's own")
    parser.add_argument("--data", metavar="FILE", help="rows to measure on; else the run's evaluation data")
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="use the first rows only (default 64)")
    parser.add_argument("--ranks", metavar="8,32", help="ranks of the estimator to compare (default 8,32)")
    parser.add_argument("--output", metavar="DIR", help="where the report goes; else RUN_DIR/inspect")
    parser.add_argument("--sparsity", action="store_true", help="the zeros of a model folder, by layer and matrix")
    parser.add_argument("--storage", action="store_true", help="the formats of a model folder, and their bits a weight")
    parser.add_argument("--against", metavar="FOLDER", help="with --sparsity: the model before; its zeros must be here")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and write ``fidelity.json`` and ``report.html``; with ``--sparsity`` see :mod:`.sparsity`, with
    ``--storage`` :mod:`.storage`.

    Raises:
        ConfigError: an argument, the run, the model or the data cannot be used.
    """
    if arguments.sparsity and arguments.storage:
        raise ConfigError("'--storage' and '--sparsity' are two questions: ask one")
    if arguments.storage:
        from .storage import run as look_at_storage

        return look_at_storage(arguments)
    if arguments.sparsity:
        from .sparsity import run as look_at_zeros

        return look_at_zeros(arguments)
    if arguments.against:
        raise ConfigError("'--against' compares the zeros of two models: give --sparsity too, or leave it out")
    from transformers.utils.logging import disable_progress_bar

    with importing():
        from ..quality.report import write_report
        from ..quality.subject import find_subject, measure, to_json

    disable_progress_bar()
    ranks = _ranks(arguments.ranks)
    subject = find_subject(arguments.target, arguments.config)
    output = Path(arguments.output) if arguments.output else subject.run / "inspect" if subject.run else None
    if output is not None and output.exists() and not output.is_dir():
        raise ConfigError(f"'--output' is {output}, which is a file: allowed: a folder")
    fidelity = measure(subject, data=arguments.data, rows=arguments.rows, ranks=ranks)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / FIDELITY_FILE, to_json(fidelity))
        write_report(output / REPORT_FILE, subject.config, subject.run, fidelity)
    if arguments.json:
        print(to_json(fidelity))
    else:
        _print(fidelity)
        if output is not None:
            print(f"\nreport: {output / REPORT_FILE}")
    return 0


def _ranks(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"'--ranks' is {text!r}: allowed: integers from 1 with commas between, such as 8,32"
        ) from error


def _print(fidelity: dict[str, Any]) -> None:
    adapter = "with the run's adapter" if fidelity["adapter"] else "no adapter"
    print(
        f"{fidelity['rows']} rows of {Path(fidelity['data']).name}, {fidelity['batches']} batches of "
        f"{fidelity['rows_per_batch']}, {fidelity['context_tokens']} of {fidelity['tokens']} tokens context, {adapter}"
    )
    print(
        "recall: exactly chosen channels that are kept, %; energy: squared activations of the kept channels, % of all\n"
        f"same: kept channels in common, %, at rank {fidelity['own_rank']}, of consecutive batches and of a batch's halves\n"
    )
    choices = ["random", *map(str, fidelity["ranks"])]
    titles = ["random", *(f"r{rank}" for rank in fidelity["ranks"])]
    head = f"{'group':<6}{'layer':>6}{'kept':>12}"
    recall = "".join(f"{title:>7}" for title in titles)
    print(f"{'':24}{'recall'.rjust(len(recall))} {'energy'.rjust(len(recall) + 8)}{'same':>12}")
    print(f"{head}{recall} {recall}{'exact':>8}{'batches':>8}{'ranks':>7}")
    for group, means in fidelity["groups"].items():
        for site in fidelity["sites"]:
            if site["group"] == group:
                kept = f"{site['kept']}/{site['channels']}"
                print(_line(group, str(site["layer"]), kept, site, choices))
        print(_line(group, "mean", "", means, choices))
    adapted = {group: means["adapted_recall"] for group, means in fidelity["groups"].items()}
    if any(value is not None for value in adapted.values()):
        figures = ", ".join(f"{group} {_percent(value)}" for group, value in adapted.items() if value is not None)
        print(f"\nrecall at rank {fidelity['own_rank']} against the activations with the LoRA branch: {figures}")


def _line(group: str, layer: str, kept: str, figures: dict[str, Any], choices: list[str]) -> str:
    recall = "".join(f"{_percent(figures['recall'][name]):>7}" for name in choices)
    energy = "".join(f"{_percent(figures['energy'][name]):>7}" for name in choices)
    return (
        f"{group:<6}{layer:>6}{kept:>12}{recall} {energy}{_percent(figures['energy']['exact']):>8}"
        f"{_percent(figures['between_steps']):>8}{_percent(figures['between_ranks']):>7}"
    )


def _percent(value: Any) -> str:
    if isinstance(value, dict):
        value = value["mean"]
    return "-" if value is None else f"{100 * value:.1f}"
