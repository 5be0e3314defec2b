"""A Chromium without a window, for tests that look at a page."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str:
    """A browser that starts; ``SPARSELORA_BROWSER`` names one that is not on the path. ``.ci/browser`` installs one.

    Without one the test is skipped; where ``CI=true`` it fails.
    """
    for name in filter(None, (os.environ.get("SPARSELORA_BROWSER"), *BROWSERS)):
        program = shutil.which(name)
        # Ubuntu's package is a script that asks for another package manager.
        if program and subprocess.run([program, "--version"], capture_output=True, timeout=60).returncode == 0:
            return program
    text = f"no browser: none of {', '.join(BROWSERS)} starts here, SPARSELORA_BROWSER names none; see .ci/browser"
    if os.environ.get("CI") == "true":
        pytest.fail(text)
    pytest.skip(text)


def words(program: str, profile: Path, width: int, height: int) -> list[str]:
    """The command without what to do, in a profile of its own, for a window of that size; no name is resolved."""
    return [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", f"--window-size={width},{height}",
        "--virtual-time-budget=3000",
    ]  # fmt: skip
