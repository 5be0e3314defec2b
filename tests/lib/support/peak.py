"""The most memory that a call holds at once above what was there, by PyTorch's CPU allocator, also inside operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any]) -> int:
    """Largest sum of what ``call`` has allocated and not yet freed; what it returns counts until its end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = call()
    del kept
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    records = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert records, "the profiler saw no allocation"
    live = most = 0
    for record in sorted(records, key=lambda event: event.start_ns()):
        live += record.nbytes()
        most = max(most, live)
    return most
