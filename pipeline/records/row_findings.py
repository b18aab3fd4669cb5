"""Find what is wrong with one row, each fault with a message and a remedy; jsonschema judges by the schema."""

import json
import re
from functools import cache, reduce
from operator import getitem
from typing import TYPE_CHECKING, Any

from pipeline.records.fast_path import KEYS, MOST_KEYS
from pipeline.records.file_formats import other_format
from pipeline.records.records import LABELS, LONGEST_TAG, MOST_TAGS, Finding, Record, Row, misnamed_key, text_faults
from pipeline.words import printable

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import ValidationError

SCHEMA = "alpaca-record.schema.json"
KEY_WIDTH = _VALUE_WIDTH = 60


def row_findings(row: Row, record: Record | None, special: re.Pattern[str] | None) -> list[Finding]:
    """Return the findings about a row, none if it is good; `record` is the result of `record_of` for it."""
    findings = schema_findings(row) if record is None else []
    if not (findings and findings[0].rule == "format"):
        findings += [_finding(row, *fault) for fault in text_faults(row.value, special)]
    return findings


def schema_findings(row: Row) -> list[Finding]:
    """Return a row's findings by the schema and for misnamed keys, or only that of another format or too many keys."""
    value = row.value
    if not isinstance(value, dict):
        return [_worded(row, error) for error in _schema().iter_errors(value)]
    if len(value) > MOST_KEYS:
        message, remedy = f"the record has more than {MOST_KEYS:,} keys", "keep instruction, input and output alone"
        return [_finding(row, None, "maxproperties", message, remedy)]
    if (other := other_format(value)) is not None:
        remedy = "write each question as instruction and its answer as output, one record a line"
        return [_finding(row, other[0], "format", f"the row is {other[1]}", remedy)]
    known = {key: value[key] for key in (*KEYS, *LABELS) if key in value}
    if isinstance(value.get("tags"), list):
        # One too many is enough to be told of.
        known["tags"] = value["tags"][: MOST_TAGS + 1]
    findings = [_worded(row, error) for error in _schema().iter_errors(known)]
    if (near := misnamed_key(value, "input")) is not None:
        name = printable(near[:KEY_WIDTH])
        remedy = 'did you mean "input"? rename the key, or leave it out'
        findings.append(_finding(row, "input", "misnamed_key", f'"{name}" is not a key of a record', remedy))
    return findings


@cache
def _schema() -> "Draft202012Validator":
    """Return the schema's validator, built once; its registry is empty, so that nothing is ever fetched."""
    from importlib import resources  # noqa: PLC0415 - a quick start: most files have no row that it is needed for

    from jsonschema import Draft202012Validator  # noqa: PLC0415
    from referencing import Registry  # noqa: PLC0415

    text = resources.files("schemas").joinpath(SCHEMA).read_text(encoding="utf-8")
    schema = json.loads(text)
    Draft202012Validator.check_schema(schema)
    registry: Registry[Any] = Registry()
    return Draft202012Validator(schema, registry=registry)


def _worded(row: Row, error: "ValidationError") -> Finding:
    """Convert a jsonschema error to a finding with a message of its own, since jsonschema's repeats the value."""
    field = str(error.path[0]) if error.path else None
    value = reduce(getitem, error.absolute_path, row.value)
    if error.validator == "required":
        # The schema gives an error for each missing key, which its message begins with.
        return _missing_finding(row, next(key for key in KEYS if error.message.startswith(repr(key))))
    if field == "tags":
        allowed = f"at most {MOST_TAGS} texts of 1 to {LONGEST_TAG} characters"
        message = f"tags are not {allowed}, none blank or with control characters"
        return _finding(row, field, str(error.validator).lower(), message, 'write "tags": ["one", "two"]')
    if error.validator == "pattern":
        return _finding(row, field, "blank", f"{field} is blank", f"write the {field}, or leave the row out")
    if field is None:
        remedy = 'write {"instruction": ..., "input": ..., "output": ...}'
        return _type_finding(row, None, "a record is an object, this is {}", remedy, value)
    if value is None and field in {"input", "group"}:
        remedy = "use an empty string or leave it out"
    elif value is None or isinstance(value, list | dict):
        remedy = f"write the {field} as one text"
    else:
        remedy = "put it in quotes"
    return _type_finding(row, field, f"{field} is {{}}, not a text", remedy, value)


def _missing_finding(row: Row, field: str) -> Finding:
    near = misnamed_key(row.value, field)
    if near is None:
        return _finding(row, field, "missing", f"{field} is missing", f'add the key "{field}" with a text')
    name = printable(near[:KEY_WIDTH])
    remedy = f'did you mean "{field}"? rename the key "{name}"'
    return _finding(row, field, "misnamed_key", f'{field} is missing, but there is "{name}"', remedy)


def _finding(row: Row, field: str | None, rule: str, message: str, remedy: str) -> Finding:
    return Finding(line=row.line, field=field, rule=rule, message=message, remedy=remedy)


def _type_finding(row: Row, field: str | None, message: str, remedy: str, value: object) -> Finding:
    """Return the finding about a value of the wrong type, which `message` has a place for: `a number: 12`."""
    match value:
        case str():
            kind, quoted = "a text", f': "{printable(value[:_VALUE_WIDTH])}{"…" * (len(value) > _VALUE_WIDTH)}"'
        case bool():
            kind, quoted = "true or false", f": {json.dumps(value)}"
        case int() | float():
            kind, quoted = "a number", f": {str(value)[:_VALUE_WIDTH]}"
        case _:
            kind, quoted = "an object" if isinstance(value, dict) else "a list" if value is not None else "null", ""
    finding = _finding(row, field, "type", message.format(kind + quoted), remedy)
    return finding.model_copy(update={"bare": message.format(kind)})
