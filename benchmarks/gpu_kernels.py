"""Every Triton kernel against its plain formula, on the device, for benchmarks/gpu.py."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from gpu_kernel_cases import SIZES, TINY_SIZES, Check, all_checks
from torch import Tensor

# Parts that a process takes one after another, so that a wrong kernel is known before the last is compiled.
_PARTS_EACH = 3


def verify(checks: Iterable[Check]) -> Iterator[dict[str, Any]]:
    """A row for each check: its error, whether that is allowed, and what is wrong. Twice run, each kernel must give the
    same bits."""
    for check in checks:
        row = {"kernel": check.name, "dtype": check.dtype, "error": math.inf, "allowed": check.tolerance, "problem": ""}
        try:
            first, second = list(check.run()), list(check.run())
            row["error"] = max((_error(got, want) for got, want in first), default=0.0)
            repeats = all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second))
        except Exception as problem:  # A row like the others, whatever it is.
            row["problem"] = f"{type(problem).__name__}: {problem}"
        else:
            if not row["error"] <= check.tolerance:
                row["problem"] = f"off by {row['error']:.2g} of the largest value, allowed {check.tolerance:g}"
            elif not repeats:
                row["problem"] = "two runs differ"
        yield row


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return math.inf
    if not got.numel():
        return 0.0
    got, want = got.double(), want.to(got.device).double()
    # Results are of order 1: a single one that happens to be small is not held to its own size.
    error = ((got - want).abs().max() / want.abs().max().clamp_min(0.5)).item()
    return error if math.isfinite(error) else math.inf


def check_kernels(device: torch.device, *, tiny: bool, processes: int = 1) -> Iterator[dict[str, Any]]:
    """Rows of all checks, see :func:`verify`, as they come. Processes share them, since compiling takes most of the time;
    what they compile is in Triton's cache for whoever comes after them."""
    if processes == 1:
        yield from verify(all_checks(device, TINY_SIZES if tiny else SIZES))
        return
    parts = processes * _PARTS_EACH
    work = [(str(device), tiny, number, parts) for number in range(parts)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for rows in pool.imap_unordered(_check_part, work):
            yield from rows


def _check_part(work: tuple[str, bool, int, int]) -> list[dict[str, Any]]:
    """Rows of every ``parts``-th check from ``number`` on."""
    device, tiny, number, parts = work
    return list(verify(islice(all_checks(torch.device(device), TINY_SIZES if tiny else SIZES), number, None, parts)))


def summary(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checks by kernel and dtype: how many, how many are wrong, the worst error."""
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = row["kernel"].split(",")[0], row["dtype"]
        start = {
            "kernel": key[0],
            "dtype": key[1],
            "cases": 0,
            "wrong": 0,
            "worst error": 0.0,
            "allowed": row["allowed"],
        }
        known = worst.setdefault(key, start)
        known["cases"] += 1
        known["wrong"] += bool(row["problem"])
        known["worst error"] = max(known["worst error"], row["error"])
    return list(worst.values())
