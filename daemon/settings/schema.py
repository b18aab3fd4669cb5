"""
The settings as a JSON Schema for editors, made from `daemon.settings.model`.

    python -m daemon.settings.schema > schemas/settings.schema.json

The schema knows names, kinds and bounds; cron expressions and time zones are judged by the model.
"""

import json
import sys
from typing import Any

from daemon.settings.model import RESERVED_TRACKS, Settings, TrackSettings


def settings_schema() -> dict[str, Any]:
    """Return the JSON Schema of `Settings`: it refuses unknown keys; a track's table holds `TrackSettings`' keys."""
    schema = Settings.model_json_schema()
    track = TrackSettings.model_json_schema()
    track.pop("$defs")  # the same sections stand in the whole schema
    for field in track["properties"].values():
        del field["default"]  # what a track leaves out comes from the top level
    schema["$defs"]["TrackSettings"] = track
    schema["properties"]["tracks"] |= {
        "propertyNames": {
            "pattern": "^[-_]*[A-Za-z0-9][A-Za-z0-9_-]*$",
            "not": {"enum": sorted(RESERVED_TRACKS)},
        },
        "additionalProperties": {"$ref": "#/$defs/TrackSettings"},
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def text() -> str:
    """Return the JSON Schema as text, as it is to be in `schemas/settings.schema.json`; nothing is written."""
    return json.dumps(settings_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
