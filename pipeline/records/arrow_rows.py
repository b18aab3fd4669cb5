"""
Write the rows of Parquet files, or of Arrow files that datasets saved, as JSON Lines, all values as texts.

`python -m pipeline.records.arrow_rows OUT MOST FILE...` writes the file OUT, of at most MOST bytes. Nested values stay
lists and objects, columns of bytes are left out, and numbers that datasets has names for become these. On an error it
prints {"error": MESSAGE, "hint": REMEDY}. It runs in its own process, with little memory: pyarrow belongs to the
training stack, and a few bytes of a file can stand for gigabytes of text.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.errors import EXIT_BAD_DATA, DropforgeError
from pipeline.models.ask import run
from pipeline.models.untrusted import little_memory, parse_json

#: Rows that are decoded at once.
_BATCH = 100
_BUFFER_BYTES = 1 << 20


def write_rows(target: Path, most: int, files: Sequence[str]) -> None:
    """
    Write the rows of `files` to `target`, a JSON object per line, all values as texts as the module describes.

    Raises pyarrow's errors, and `DropforgeError` for more than `most` bytes or two columns of the same name; an
    incomplete `target` stays.
    """
    with target.open("w", encoding="utf-8") as file:
        for batch in (batch for path in files for batch in _batches(path)):
            if len(set(batch.schema.names)) < len(batch.schema.names):
                raise DropforgeError("several columns have the same name", "give each a name of its own", EXIT_BAD_DATA)
            names = _names(batch.schema)
            columns = zip(batch.schema.names, batch.columns, strict=True)
            texts = {
                name: _texts(column, names.get(name)) for name, column in columns if "binary" not in str(column.type)
            }
            for row in zip(*texts.values(), strict=True):
                file.write(json.dumps(dict(zip(texts, row, strict=True)), default=str) + "\n")
            if file.tell() > most:
                message = f"its rows have more than {most:,} bytes as text, the limit (intake.max_bytes)"
                raise DropforgeError(message, "split it, or raise intake.max_bytes", EXIT_BAD_DATA)


def _batches(path: str) -> Iterator[Any]:
    import pyarrow as pa  # noqa: PLC0415 - after what `_work` says without it
    from pyarrow import ipc, parquet  # noqa: PLC0415

    if path.endswith(".arrow"):
        for batch in ipc.open_stream(pa.OSFile(path)):  # not mapped into memory, which is limited
            yield from (batch.slice(start, _BATCH) for start in range(0, batch.num_rows, _BATCH))
    else:
        yield from parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES).iter_batches(_BATCH, use_threads=False)


def _names(schema: Any) -> dict[str, list[str]]:
    """Return, by column, the class names that datasets stored for its numbers; empty if the schema has none."""
    try:
        features = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: list(map(str, of["names"])) for name, of in features.items() if of.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _texts(column: Any, names: Sequence[str] | None) -> list[Any]:
    """Return a column's values as texts, as they are if nested; null, or a number without one of `names`, is `None`."""
    import pyarrow as pa  # noqa: PLC0415

    if names is not None:
        return [names[at] if at is not None and 0 <= at < len(names) else None for at in column.to_pylist()]
    values = column if pa.types.is_nested(column.type) else column.cast(pa.string())
    return list(values.to_pylist())


def _work() -> None:
    try:
        import_module("pyarrow.parquet")  # what libraries take does not count
    except ModuleNotFoundError as error:
        message = "pyarrow, which reads it, is not installed here"
        raise DropforgeError(message, "convert it where the training stack is, or: pip install pyarrow") from error
    with little_memory():
        write_rows(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])


if __name__ == "__main__":
    sys.exit(run(_work, "see whether it is whole; else save it as JSON Lines with the program that wrote it"))
