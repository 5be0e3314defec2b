"""The JSON Schema of a run file, by which an editor completes keys and marks what is wrong."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from .run import RunConfig

__all__ = ["run_schema"]


class _Untitled(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # a key is its own title


def run_schema() -> dict[str, Any]:
    """Generated from the sections: their keys, types, bounds and descriptions."""
    schema = TypeAdapter(RunConfig).json_schema(schema_generator=_Untitled)
    named = {"$schema": {"type": "string", "description": "Where an editor finds this schema; not read by a run."}}
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        **schema,
        "properties": named | schema["properties"],
    }
