"""
Uploads: put files into the inbox as `dropforge submit` does; the intake takes them from there.

The form is POST /upload, multipart: `file`, one or more, `track`, `heldout` (there, or not); `done.html` answers it.
The whole form is received into temporary files; then each is copied into the inbox under a name that the watcher
ignores, and all are renamed.
"""

import shutil
from contextlib import ExitStack

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from daemon.inbox.submit import incoming, require_usable
from daemon.web.actions import Done
from daemon.web.drawing import draw
from daemon.web.security import bounded
from daemon.web.site import Site, SiteOf
from pipeline.errors import EXIT_BAD_DATA, DropforgeError
from pipeline.words import size_words

router = APIRouter(tags=["act"])
forms = APIRouter()
#: Longest file name and longest other field, in bytes; most fields and most files.
_MOST_NAME, _MOST_FIELD, _MOST_FIELDS, _MOST_FILES = 255, 1024, 10, 100
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "track": {"type": "string", "default": "default"},
                        "heldout": {"type": "string"},
                        "file": {"type": "string", "format": "binary"},
                    },
                    "required": ["file"],
                }
            }
        },
    }
}


class BadUpload(DropforgeError):
    """The request is not a form with files, or one of its files is refused."""

    exit_code = EXIT_BAD_DATA


@router.post("/upload", openapi_extra=_FORM)
async def upload(request: Request, site: SiteOf) -> Done:
    """Put files into the inbox of a track, or into its folder for held-out records."""
    return Done(words=tuple(await _take(request, site)))


@forms.post("/upload")
async def by_form(request: Request, site: SiteOf) -> Response:
    """Put files into the inbox, and render `done.html`."""
    return draw(request, "done.html", {"words": await _take(request, site), "back": "/inbox"})


async def _take(request: Request, site: Site) -> list[str]:
    """Put the files of a form into the inbox; return a sentence per file. Raises `DropforgeError`, `HTTPException`."""
    limited = Request(request.scope, bounded(request.receive, site.settings.intake.max_bytes))
    form = limited.form(max_files=_MOST_FILES, max_fields=_MOST_FIELDS, max_part_size=_MOST_FIELD)
    try:
        async with form as sent:
            return await run_in_threadpool(_put, sent.multi_items(), site)
    except ClientDisconnect as error:
        raise BadUpload("what was sent broke off", "send it again") from error


def _put(sent: list[tuple[str, UploadFile | str]], site: Site) -> list[str]:
    """
    Copy the files of a form into the inbox under hidden names, then rename them; return a sentence per file.

    Raises `BadUpload` if a file is refused; its message says of each file whether it is in the inbox.
    """
    fields = {name: value.strip() for name, value in sent if isinstance(value, str)}
    # A form without a chosen file sends one without a name.
    files = [(_plain_name(one.filename), one) for _, one in sent if isinstance(one, UploadFile) and one.filename]
    if not files:
        hint = "send a .jsonl or .json file as multipart/form-data; with curl: -F track=default -F file=@FILE.jsonl"
        raise BadUpload("there is no file in what was sent", hint)
    track, heldout = fields.get("track") or "default", "heldout" in fields
    site.settings.track(track)
    settle = f"it is taken once it has not changed for {site.settings.intake.settle_seconds:g} s"
    told: list[str] = []
    refused: DropforgeError | None = None
    with ExitStack() as opened:
        copies = [(name, one, opened.enter_context(incoming(site.settings))) for name, one in files]
        for _, one, new in copies:
            shutil.copyfileobj(one.file, new.file)
        for name, one, new in copies:
            try:
                new.place(name, track, heldout=heldout)
                told.append(f"{name} ({size_words(one.size or 0)}) is in the inbox: {settle}")
            except DropforgeError as error:
                told.append(f"{name} is refused: {error.message}")
                refused = error
    if refused is not None:
        raise BadUpload("; ".join(told), refused.hint) from refused
    return told


def _plain_name(name: str) -> str:
    """Return the name of an uploaded file. Raises `DropforgeError` if it is a path, too long or ignored."""
    if "/" in name or "\0" in name or name in {".", ".."} or len(name.encode()) > _MOST_NAME:
        raise BadUpload("a file is sent under a name that is none", "rename it: a name without /, of at most 255 bytes")
    require_usable(name)
    return name
