"""
The settings as a JSON Schema for editors and as a chapter for people, both made from `daemon.settings.model`.

    python -m daemon.settings.schema > schemas/settings.schema.json
    python -m daemon.settings.schema chapter > docs/settings.md

The schema knows names, kinds and bounds; cron expressions and time zones are judged by the model.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from daemon.settings.model import RESERVED_TRACKS, Settings, TrackSettings

_HEAD = """\
# Settings

Made by `python -m daemon.settings.schema chapter > docs/settings.md`: change the docstrings in
`daemon/settings/model.py` and `pipeline/config.py` instead.

They stand in `dropforge.toml`, which the commands and the daemon look for in the folder that they are started in, or
where `--config FILE` or `DROPFORGE_CONFIG` says. A variable goes before the file: `DROPFORGE_TRAIN__EPOCHS=2` is
`epochs` in `[train]`. Unknown names are refused with the nearest known one. The daemon reads them at its start.
[systemd/dropforge.toml](../systemd/dropforge.toml) is the same list as a file to begin with,
`schemas/settings.schema.json` is for editors, with all bounds.

A track has settings of its own in `[tracks.NAME]`, those of a section in `[tracks.NAME.train]`; what it leaves out is
as at the top level. The sections marked with * are of the whole installation, so no track has its own.
"""


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


def chapter() -> str:
    """Return the chapter of all settings in Markdown, as it is to be in `docs/settings.md`; nothing is written."""
    schema = settings_schema()
    definitions, of_tracks = schema["$defs"], schema["$defs"]["TrackSettings"]["properties"]
    top: dict[str, Any] = {}
    sections: list[tuple[str, str, Mapping[str, Any]]] = []
    for name, field in schema["properties"].items():
        section = definitions.get(field.get("$ref", "").rpartition("/")[2])
        if section is None:
            top[name] = field
        else:
            mark = "" if name in of_tracks else " *"
            sections += _sections(name, mark, section, definitions)
    whole = {name: field for name, field in top.items() if name not in of_tracks and name != "tracks"}
    own = {name: field for name, field in top.items() if name in of_tracks}
    parts = [
        ("At the top *", "Of the whole installation.", whole),
        ("At the top", "Of all tracks, unless one has its own.", own),
        *sections,
    ]
    return _HEAD + "".join(_part(*part) for part in parts)


def _sections(
    name: str, mark: str, section: Mapping[str, Any], definitions: Mapping[str, Any]
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield a section, and those within it, each with its title and what it is for."""
    fields = section["properties"]
    inner = {field: definitions.get(known.get("$ref", "").rpartition("/")[2]) for field, known in fields.items()}
    own = {field: known for field, known in fields.items() if inner[field] is None}
    yield f"[{name}]{mark}", section["description"], own
    for field, part in inner.items():
        if part is not None:
            yield from _sections(f"{name}.{field}", mark, part, definitions)


def _part(title: str, words: str, fields: Mapping[str, Any]) -> str:
    rows = "".join(f"{row}\n" for row in _rows(fields))
    return f"\n## {title}\n\n{words}\n\n| setting | default | |\n|---|---|---|\n{rows}"


def _rows(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, field in fields.items():
        words = str(field.get("description", "")).replace("\n", " ").replace("|", "\\|")
        choices = [json.dumps(value) for value in field.get("enum", ()) if value != field.get("default")]
        other = f" Or {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
        yield f"| `{name}` | `{json.dumps(field.get('default', {}), ensure_ascii=False)}` | {words}{other} |"


if __name__ == "__main__":
    sys.stdout.write(chapter() if sys.argv[1:] == ["chapter"] else text())
