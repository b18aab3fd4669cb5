"""
Uploads: put files into the inbox as `dropforge submit` does; the intake takes them from there.

The whole form is received into temporary files; then each is copied into the inbox under a name that the watcher
ignores, and all are renamed. A table is sent twice: nothing is kept between its preview and its drop.
"""

import shutil
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request, UploadFile
from fastapi.responses import Response

from daemon.inbox.quarantine import validation_options
from daemon.inbox.submit import incoming, require_usable
from daemon.inbox.tables import conversion
from daemon.inbox.tables.reading import open_table
from daemon.web.actions import Done
from daemon.web.site import Site, SiteOf, draw
from pipeline.errors import DropforgeError
from pipeline.records.fast_path import KEYS
from pipeline.records.records import LABELS, SELECTED
from pipeline.words import size_words

router = APIRouter(tags=["act"])
forms = APIRouter()
#: Longest file name, in bytes.
_MOST_NAME = 255


def put(
    site: SiteOf,
    file: list[UploadFile],
    track: Annotated[str, Form()] = "default",
    heldout: Annotated[str | None, Form()] = None,
) -> list[str]:
    """
    Copy the files of a form into the inbox under hidden names, then rename them; return a sentence per file.

    A `heldout` of any text puts them into the track's folder for held-out records. Raises `DropforgeError` if a file is
    refused: its message says of each file whether it is in the inbox, where accepted files stay. Raises it before any
    file is put if a name is unusable, `track` is not declared or there is no inbox.
    """
    # FastAPI answers 422 if the form has no file; a file without a name is none.
    files = [(_plain_name(upload.filename or ""), upload) for upload in file]
    site.settings.track(track)
    settle = f"it is taken once it has not changed for {site.settings.intake.settle_seconds:g} s"
    results: list[str] = []
    refused: DropforgeError | None = None
    with ExitStack() as opened:
        copies = [(name, upload, opened.enter_context(incoming(site.settings))) for name, upload in files]
        for _, upload, new in copies:
            shutil.copyfileobj(upload.file, new.file)
        for name, upload, new in copies:
            try:
                new.place(name, track, heldout=heldout is not None)
                results.append(f"{name} ({size_words(upload.size or 0)}) is in the inbox: {settle}")
            except DropforgeError as error:
                results.append(f"{name} is refused: {error.message}")
                refused = error
    if refused is not None:
        raise DropforgeError("; ".join(results), refused.hint) from refused
    return results


@router.post("/upload")
def upload(results: Annotated[list[str], Depends(put)]) -> Done:
    """Put files into the inbox of a track, or into its folder for held-out records; return a sentence per file."""
    return Done(words=tuple(results))


async def texts(request: Request) -> dict[str, str]:
    """Return the text fields of a form, without its files."""
    return {name: value for name, value in (await request.form()).items() if isinstance(value, str)}


@forms.post("/upload")
def by_form(
    request: Request, site: SiteOf, file: list[UploadFile], fields: Annotated[dict[str, str], Depends(texts)]
) -> Response:
    """
    Put files into the inbox, and render `done.html`; a table is answered by `_table`.

    A table is a file that does not end in .jsonl or .json. Raises `DropforgeError` if it is sent with other files.
    """
    tables = [name for name in (each.filename or "" for each in file) if not name.lower().endswith((".json", ".jsonl"))]
    if not tables:
        results = put(site, file, fields.get("track", "default"), fields.get("heldout"))
        return draw(request, "done.html", {"words": results, "back": "/inbox"})
    if len(file) > 1:
        message = f"{tables[0]} is no .jsonl or .json file, so its columns are to be looked at"
        raise DropforgeError(message, "send it alone")
    with TemporaryDirectory(prefix="upload-") as folder:
        return _table(request, site, file[0], fields, Path(folder))


def _table(request: Request, site: Site, file: UploadFile, fields: dict[str, str], folder: Path) -> Response:
    """
    Convert a table: put its records into the inbox and render `done.html`, or only show the result in `table.html`.

    They are put if the form has a field `drop`, there are records, and the columns are known or named in the form.
    Raises `DropforgeError` if the table cannot be read, or the inbox refuses the records.
    """
    name, track, most = _plain_name(file.filename or ""), fields.get("track", "default"), site.settings.intake.max_bytes
    options = validation_options(site.settings, track, name)
    with folder.joinpath("table").open("wb") as copy:
        shutil.copyfileobj(file.file, copy)
    table = open_table(folder / "table", name, folder, most)
    tags = (SELECTED,) if "selected" in fields else ()
    keys, made = (*KEYS, *LABELS), folder / "records.jsonl"
    choice = conversion.choose(table.columns, {key: fields[key] for key in keys if key in fields})
    result = None if choice.missing else conversion.convert(table, choice.columns, made, options, most, tags)
    if result is None or not result.kept or not choice.known or "drop" not in fields:
        context = {"name": name, "table": table, "choice": choice, "result": result, "fields": fields, "keys": keys}
        return draw(request, "table.html", context)
    with made.open("rb") as old, incoming(site.settings) as new:
        shutil.copyfileobj(old, new.file)
        path = new.place(conversion.new_name(name), track, heldout="heldout" in fields)
    words = [f"{path.name} is in the inbox: {result.words}", *result.losses]
    return draw(request, "done.html", {"words": words, "back": "/inbox"})


def _plain_name(name: str) -> str:
    """Return `name` unchanged. Raises `DropforgeError` if it is empty, a path, too long or ignored by the watcher."""
    if "/" in name or "\0" in name or name in {"", ".", ".."} or len(name.encode()) > _MOST_NAME:
        raise DropforgeError(
            "a file is sent under a name that is none", "rename it: a name without /, of at most 255 bytes"
        )
    require_usable(name)
    return name
