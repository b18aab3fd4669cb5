"""What SQLite refuses in a column, whoever writes it: unknown states, values of other types, what no path may be."""

from enum import StrEnum

from sqlalchemy import Boolean, CheckConstraint, Float, Integer, LargeBinary
from sqlmodel import JSON, SQLModel

#: The times, in ms since the epoch, that a `datetime` holds: the years 1 to 9999.
_FIRST_MS, _LAST_MS = -62_135_596_800_000, 253_402_300_799_999
_NAME = "{0} <> '' AND {0} NOT GLOB '*[^A-Za-z0-9_-]*'"
#: An absolute path without . and .. in it.
_ABSOLUTE = "{0} GLOB '/*' AND " + " AND ".join(f"{{0}} || '/' NOT GLOB '*{part}*'" for part in ("//", "/./", "/../"))
_MODEL = f"{{0}} GLOB 'models/[0-9a-f]*' AND ltrim(substr({{0}}, 8), '0123456789abcdef') = '' OR {_ABSOLUTE}"
#: The columns that become parts of paths, by table, with what a restore allows in them.
IN_PATHS = {
    **dict.fromkeys(("track.name", "drop.track", "run.track", "promotion.track"), _NAME),
    "drop.sha256": "{0} NOT GLOB '*[^0-9a-f]*'",
    "drop.owner": "{0} NOT GLOB '*/*'",
    "attempt.step": "{0} <> '' AND {0} NOT GLOB '*[^a-z]*'",
    "track.base_path": _ABSOLUTE,
    **dict.fromkeys(("track.champion_path", "promotion.model_path", "promotion.previous_path"), _MODEL),
}


def one_of(column: str, states: type[StrEnum]) -> CheckConstraint:
    """Return the constraint that a column has one of `states`, or NULL."""
    names = ", ".join(f"'{state.value}'" for state in states)
    return CheckConstraint(f"{column} IN ({names})", name=f"{column}_known")


def require_types(kind: type[SQLModel]) -> None:
    """Add constraints to the table of `kind`: the columns' types, no NUL in paths, no number beyond any date."""
    table = SQLModel.metadata.tables[str(kind.__tablename__)]
    for column in table.columns:
        field, name = kind.model_fields[column.name], f'"{column.name}"'
        if isinstance(column.type, JSON):
            begins = "[" if "list" in str(field.annotation) else "{"
            rule = f"json_valid({name}) AND typeof({name}) = 'text' AND substr({name}, 1, 1) = '{begins}'"
        elif isinstance(column.type, (Boolean, Integer, Float)):
            number = "real" if isinstance(column.type, Float) else "integer"
            least, most = (0, 1) if isinstance(column.type, Boolean) else (_FIRST_MS, _LAST_MS)
            rule = f"typeof({name}) = '{number}' AND {name} BETWEEN {least} AND {most}"
        elif isinstance(column.type, LargeBinary):
            rule = f"typeof({name}) = 'blob'"
        else:
            rule = f"typeof({name}) = 'text'"
            if f"{table.name}.{column.name}" in IN_PATHS:
                rule += f" AND instr({name}, char(0)) = 0"
        table.append_constraint(CheckConstraint(f"{name} IS NULL OR ({rule})", name=f"{column.name}_typed"))
