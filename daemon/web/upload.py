"""
Files brought by a browser: they go into the inbox as `dropforge submit` puts them there, and the intake answers them.

The form is POST /upload, multipart: `file`, one or more, `track`, `heldout` (there, or not); `done.html` answers it.
Each file is written as it comes, under a name that the watcher passes over; all appear when the whole form is there.
"""

from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Self

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from daemon.inbox.submit import Incoming, incoming, require_usable
from daemon.web.actions import Done
from daemon.web.drawing import draw
from daemon.web.site import Site, SiteOf
from pipeline.errors import EXIT_BAD_DATA, DropforgeError
from pipeline.words import size_words

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

router = APIRouter(tags=["act"])
forms = APIRouter()
#: The longest name of a file, in bytes, and field beside files; how many fields and files.
_MOST_NAME, _MOST_FIELD, _MOST_FIELDS, _MOST_FILES = 255, 1000, 10, 100
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
    """What was sent is no form with files, or a file of it cannot be taken."""

    exit_code = EXIT_BAD_DATA


@router.post("/upload", openapi_extra=_FORM)
async def upload(request: Request, site: SiteOf) -> Done:
    """Put files into the inbox of a track, or into its folder for held-out records."""
    return Done(words=tuple(await _take(request, site)))


@forms.post("/upload")
async def by_form(request: Request, site: SiteOf) -> Response:
    """Put files into the inbox, and draw `done.html`."""
    return draw(request, "done.html", {"words": await _take(request, site), "back": "/inbox"})


class _Part(NamedTuple):
    """What the parser has found: the beginning of a part, a piece of it, or its end."""

    kind: str
    data: bytes = b""
    name: str = ""
    filename: str | None = None


async def _take(request: Request, site: Site) -> list[str]:
    """Put each file of a form into the inbox; return a sentence per file. Raises `DropforgeError`."""
    with _Receiver(site) as receiver:
        async for parts in _parts(request):
            await run_in_threadpool(receiver.add, parts)
        return await run_in_threadpool(receiver.finish)


class _Receiver:
    """Takes the parts of a form one after the other; what comes of it is there behind `finish`, or not at all."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._fields: dict[str, str] = {}
        self._name = ""
        self._field = bytearray()
        self._opened = ExitStack()
        self._files: list[tuple[str, Incoming]] = []
        self._file: BinaryIO | None = None
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._opened.close()

    def add(self, parts: list[_Part]) -> None:
        """Take what came."""
        for part in parts:
            {"begin": self._begin, "data": self._write, "end": self._end}[part.kind](part)

    def finish(self) -> list[str]:
        """
        Let the files appear in the inbox; return a sentence for each.

        Raises `BadUpload` if one cannot; it tells of each file whether it is there.
        """
        if self._file is not None or not self._files:
            cut = f"{self._files[-1][0]} was cut off" if self._files else "there is no file in what was sent"
            raise BadUpload(cut, "send a .jsonl or .json file of records with instruction, input and output")
        track, heldout = self._fields.get("track") or "default", "heldout" in self._fields
        self._site.settings.track(track)
        settle = f"it is taken once it has not changed for {self._site.settings.intake.settle_seconds:g} s"
        told: list[str] = []
        refused: DropforgeError | None = None
        for name, new in self._files:
            octets = new.file.tell()
            try:
                new.place(name, track, heldout=heldout)
                told.append(f"{name} ({size_words(octets)}) is in the inbox: {settle}")
            except DropforgeError as error:
                told.append(f"{name} is refused: {error.message}")
                refused = error
        if refused is not None:
            raise BadUpload("; ".join(told), refused.hint) from refused
        return told

    def _begin(self, part: _Part) -> None:
        self._name, self._field, self._size = part.name, bytearray(), 0
        if part.filename:  # a form without a chosen file sends one without a name
            if len(self._files) == _MOST_FILES:
                message = f"more than {_MOST_FILES} files at once"
                raise BadUpload(message, "send fewer, or put them into the inbox folder")
            name = _plain_name(part.filename)
            self._files.append((name, self._opened.enter_context(incoming(self._site.settings))))
            self._file = self._files[-1][1].file

    def _write(self, part: _Part) -> None:
        self._size += len(part.data)
        if self._file is not None:
            most = self._site.settings.intake.max_bytes
            if self._size > most:
                message = f"{self._files[-1][0]} has more than the {most:,} bytes that are allowed"
                raise BadUpload(message, "split it, or raise intake.max_bytes")
            self._file.write(part.data)
        elif self._size > _MOST_FIELD:
            message = f"the field {self._name!r} is too long"
            raise BadUpload(message, "send files with their names, in fields called file")
        else:
            self._field += part.data

    def _end(self, _part: _Part) -> None:
        if self._file is not None:
            self._file = None
        elif len(self._fields) < _MOST_FIELDS:
            self._fields[self._name] = self._field.decode("utf-8", "replace").strip()


async def _parts(request: Request) -> AsyncIterator[list[_Part]]:
    """Yield what each piece of a request's body brings. Raises `BadUpload` if it is no multipart form."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise BadUpload("files are sent as multipart/form-data", "with curl: -F track=default -F file=@FILE.jsonl")
    found: list[_Part] = []
    try:
        parser = MultipartParser(options[b"boundary"], _callbacks(found))
        async for chunk in request.stream():
            parser.write(chunk)
            yield found.copy()
            found.clear()
        parser.finalize()
    except ClientDisconnect as error:
        raise BadUpload("what was sent broke off", "send it again") from error
    except FormParserError as error:
        message = f"what was sent is no form: {error}"
        raise BadUpload(message, "with curl: -F track=default -F file=@FILE.jsonl") from error


def _callbacks(found: list[_Part]) -> "MultipartCallbacks":
    """Return what the parser calls; each adds what it is told to `found`."""
    header, value, headers = bytearray(), bytearray(), {}

    def header_end() -> None:
        headers[bytes(header).lower()] = bytes(value)
        header.clear()
        value.clear()

    def headers_finished() -> None:
        _, options = parse_options_header(headers.get(b"content-disposition", b""))
        headers.clear()
        name, filename = options.get(b"name", b"").decode("utf-8", "replace"), options.get(b"filename")
        found.append(_Part("begin", b"", name, None if filename is None else filename.decode("utf-8", "replace")))

    return {
        "on_header_field": lambda data, start, end: header.extend(data[start:end]),
        "on_header_value": lambda data, start, end: value.extend(data[start:end]),
        "on_header_end": header_end,
        "on_headers_finished": headers_finished,
        "on_part_data": lambda data, start, end: found.append(_Part("data", data[start:end])),
        "on_part_end": lambda: found.append(_Part("end")),
    }


def _plain_name(name: str) -> str:
    """Return a file's name as it was sent. Raises `BadUpload` if it would lead elsewhere or is none."""
    if "/" in name or "\0" in name or name in {".", ".."} or len(name.encode()) > _MOST_NAME:
        raise BadUpload("a file is sent under a name that is none", "rename it: a name without /, of at most 255 bytes")
    require_usable(name)
    return name
