"""What a user is told, and when."""

from __future__ import annotations

import importlib

import pytest


def says(message: str, *parts: str) -> None:
    missing = [part for part in parts if part not in message]
    assert not missing, f"the message lacks {missing}:\n{message}"


def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("sparselora_dist.train.run")
    monkeypatch.setattr(module, "build_model", lambda *_, **__: pytest.fail("the model was loaded"))
