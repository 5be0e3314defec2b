"""``sparselora-dist schema``: the JSON Schema of a run file, by which an editor completes keys and marks mistakes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from ..config import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="the file to write; without it the schema is printed")


def run(arguments: argparse.Namespace) -> int:
    text = json.dumps(run_schema(), indent=2, ensure_ascii=False) + "\n"
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


def run_schema() -> dict[str, Any]:
    """Generated from the sections: their keys, types, bounds, defaults and descriptions."""
    schema = _untitled(TypeAdapter(RunConfig).json_schema())
    own = {"type": "string", "description": "Where an editor finds this schema; a run does not read it."}
    schema["properties"] = {"$schema": own, **schema["properties"]}
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


def _untitled(schema: Any) -> Any:
    """Without titles: a key is its own."""
    if isinstance(schema, list):
        return [_untitled(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _untitled(item) for key, item in schema.items() if not (key == "title" and isinstance(item, str))}
