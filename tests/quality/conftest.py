"""The tiny model, its tokenizer and its task are those of the integration tests."""

from ..integration.conftest import alone, tiny  # noqa: F401
