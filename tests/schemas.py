"""
The schemas that are made from the code: `python -m tests.schemas` (`make schemas`) writes them; tests compare.

The settings' schema, for editors, knows names, kinds and bounds; the model judges cron expressions and time zones.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic._internal._docs_extraction import extract_docstrings_from_cls
from pydantic.json_schema import GenerateJsonSchema

from daemon.settings.model import RESERVED_TRACKS, Settings, TrackSettings
from pipeline.artifacts import Frozen
from pipeline.report.facts import Report

_FOLDER = Path(__file__).parents[1] / "schemas"
_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def field_docs(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstrings below a `Frozen` model's and its parents' fields by name; fields without are left out."""
    parents = [parent for parent in reversed(model.__mro__) if issubclass(parent, Frozen)]
    docs = (extract_docstrings_from_cls(parent, use_inspect=True) for parent in parents)
    return {name: text for some in docs for name, text in some.items()}


class Described(GenerateJsonSchema):
    """A schema in which each field has its docstring. (The models would read their own source at every start.)"""

    def model_schema(self, schema: Any) -> dict[str, Any]:
        made = super().model_schema(schema)
        for name, words in field_docs(schema["cls"]).items():
            if field := made["properties"].get(schema["cls"].model_fields[name].alias or name):
                field["description"] = words
        return made


def settings() -> dict[str, Any]:
    """Return the JSON Schema of `Settings`: it refuses unknown keys; a track's table holds `TrackSettings`' keys."""
    schema = Settings.model_json_schema(schema_generator=Described)
    track = TrackSettings.model_json_schema(schema_generator=Described)
    track.pop("$defs")  # the same sections stand in the whole schema
    for field in track["properties"].values():
        del field["default"]  # what a track leaves out comes from the top level
    schema["$defs"]["TrackSettings"] = track
    schema["properties"]["tracks"] |= {
        "propertyNames": {
            "pattern": "^_*[A-Za-z0-9][A-Za-z0-9_-]*$",
            "not": {"enum": sorted(RESERVED_TRACKS)},
        },
        "additionalProperties": {"$ref": "#/$defs/TrackSettings"},
    }
    return {"$schema": _DRAFT, **schema}


def report() -> dict[str, Any]:
    """Return the JSON Schema of `report.json`, as this version writes it: every field is required."""
    return {
        "$schema": _DRAFT,
        "$id": "urn:dropforge:report",
        **Report.model_json_schema(mode="serialization", schema_generator=Described),
        "title": "Evidence card",
        "description": "The evidence behind one verdict, as report.html shows it; paths are below the work folder.",
    }


MADE: dict[str, Callable[[], dict[str, Any]]] = {"settings": settings, "report": report}


def text(name: str) -> str:
    """Return the content of `schemas/NAME.schema.json`."""
    return json.dumps(MADE[name](), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for each in MADE:
        (_FOLDER / f"{each}.schema.json").write_text(text(each), encoding="utf-8")
