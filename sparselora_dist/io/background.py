"""Writing while training goes on: one job at a time, in a thread, whose error comes up at the next question."""

from __future__ import annotations

import threading
from collections.abc import Callable


class BackgroundWriter:
    """Runs one writing job at a time.

    Args:
        background: False runs each job before :meth:`write` returns.
    """

    def __init__(self, background: bool = True) -> None:
        self._background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether a job ended in an error that nobody has seen yet; does not wait."""
        return self._error is not None

    def write(self, job: Callable[[], object]) -> None:
        """Start ``job``, after the one before it. What it writes must not change any more.

        Raises:
            Exception: that of the job before.
        """
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint writer", daemon=True)
        self._thread.start()
        if not self._background:
            self.wait()

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error

    def join(self, seconds: float | None = None) -> None:
        """Let the job end, for so long at most."""
        if self._thread is not None:
            self._thread.join(seconds)

    def wait(self) -> None:
        """Wait for the job.

        Raises:
            Exception: the job's.
        """
        self.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
