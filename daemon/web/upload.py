"""
Uploads: put files into the inbox as `dropforge submit` does; the intake takes them from there.

The whole form is received into temporary files; then each is copied into the inbox under a name that the watcher
ignores, and all are renamed.
"""

import shutil
from contextlib import ExitStack
from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request, UploadFile
from fastapi.responses import Response

from daemon.inbox.submit import incoming, require_usable
from daemon.web.actions import Done
from daemon.web.site import SiteOf, draw
from pipeline.errors import DropforgeError
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
    refused; its message says of each file whether it is in the inbox. If a name is unusable, `track` is not declared or
    there is no inbox, it raises a `DropforgeError` and puts no file.
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


Results = Annotated[list[str], Depends(put)]


@router.post("/upload")
def upload(results: Results) -> Done:
    """Put files into the inbox of a track, or into its folder for held-out records."""
    return Done(words=tuple(results))


@forms.post("/upload")
def by_form(request: Request, results: Results) -> Response:
    """Put files into the inbox, and render `done.html`."""
    return draw(request, "done.html", {"words": results, "back": "/inbox"})


def _plain_name(name: str) -> str:
    """Return the name of an uploaded file. Raises `DropforgeError` if it is a path, too long or ignored."""
    if "/" in name or "\0" in name or name in {"", ".", ".."} or len(name.encode()) > _MOST_NAME:
        raise DropforgeError(
            "a file is sent under a name that is none", "rename it: a name without /, of at most 255 bytes"
        )
    require_usable(name)
    return name
