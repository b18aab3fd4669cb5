"""
The JSON Schema of `dropforge.toml`, for editors: `python -m daemon.settings.schema > schemas/settings.schema.json`.

It says what `daemon.settings.model` says about names, kinds and bounds; cron expressions and time zones are judged
there.
"""

import json
import sys
from typing import Any

from daemon.settings.model import RESERVED_TRACKS, Settings, TrackSettings


def settings_schema() -> dict[str, Any]:
    """Return the schema: unknown keys are refused, a track's table holds any of `TrackSettings`' keys."""
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
    """Return the schema as it stands in `schemas/settings.schema.json`."""
    return json.dumps(settings_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
