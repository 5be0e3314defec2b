"""Writing in the background: one at a time, and its errors are not lost."""

from __future__ import annotations

import threading

import pytest

from sparselora_dist.io.background import BackgroundWriter

PATIENCE = 60.0


def test_one_at_a_time_and_not_in_the_callers_way() -> None:
    writer, gate, done = BackgroundWriter(), threading.Event(), []

    def slow() -> None:
        assert gate.wait(PATIENCE)
        done.append("first")

    writer.write(slow)
    assert done == [] and not writer.failed  # The caller goes on.
    threading.Timer(0.05, gate.set).start()
    writer.write(lambda: done.append("second"))
    assert done[0] == "first"
    writer.wait()
    assert done == ["first", "second"]


def test_an_error_comes_up_at_the_next_question() -> None:
    writer = BackgroundWriter()

    def full() -> None:
        raise OSError(28, "full")

    writer.write(full)
    writer.join(PATIENCE)
    assert writer.failed
    with pytest.raises(OSError, match="full"):
        writer.write(lambda: pytest.fail("started all the same"))
    assert not writer.failed
    writer.wait()


def test_in_the_foreground_it_is_done_or_raised_before_write_returns() -> None:
    writer, done = BackgroundWriter(background=False), []
    writer.write(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        writer.write(lambda: 1 // 0)
