"""
The way to the judge: an OpenAI-compatible endpoint, asked with patience that has an end.

The only module of the pipeline that speaks to a network. What the other side and the library say in their errors is
never repeated: it may hold the key. No redirect is followed, since the key would go with it.
"""

import asyncio
import json
import os
import string
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Self

import httpx2

from pipeline.config import JudgeConfig
from pipeline.judge.prompt import SAMPLING, Chat

#: Statuses that pass: a busy or broken server, not a wrong question.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
#: Statuses that every question would get, with what to look at.
_FINAL = {
    401: "it does not accept the key: judge.api_key_env names the variable that holds it",
    403: "it forbids this: see what the key may do",
    404: "there is no such address or model: see judge.url and judge.model",
    405: "it is no chat endpoint: see judge.url",
}
_OK = 200
_REDIRECTS = range(300, 400)
_LARGEST_REPLY = 1 << 20
_pause = asyncio.sleep


@dataclass(frozen=True)
class Patience:
    """How often and how long one question is tried; times in seconds."""

    tries: int = 8
    first_wait: float = 1.0
    """Doubled at each further try."""
    longest_wait: float = 60.0
    """Also of what the server asks for with Retry-After."""
    in_all: int = 200
    """Failed tries of all questions together after which no further one is asked: a queue waits behind this step."""

    def wait(self, failures: int, asked_for: float) -> float:
        """Return the seconds before the next try, after `failures` of them; `asked_for` is the server's own wish."""
        return min(max(self.first_wait * 2.0 ** (failures - 1), asked_for), self.longest_wait)


PATIENCE = Patience()


class NoAnswerError(Exception):
    """A question got no answer: `words` say why; `for_all`: every other question would fare the same."""

    def __init__(self, words: str, *, for_all: bool = False) -> None:
        """Keep the words, which are our own."""
        super().__init__(words)
        self.words = words
        self.for_all = for_all


@dataclass(frozen=True)
class _Passing:
    """A failure that may pass, and the seconds that the server asks to wait."""

    words: str
    wait: float = 0.0


def read_key(name: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the key in the variable `name`; empty if none is named. Raises `NoAnswerError` if it is not usable."""
    if not name:
        return ""
    key = environment.get(name, "").strip()
    if not key:
        message = f"the variable {name}, which judge.api_key_env names, is not set where the daemon runs"
        raise NoAnswerError(message, for_all=True)
    if not set(key) <= set(string.ascii_letters + string.digits + string.punctuation):
        message = f"the variable {name} holds characters that no key has: blanks, line breaks or other than ASCII"
        raise NoAnswerError(message, for_all=True)
    return key


class Endpoint:
    """One endpoint and model; use it as an asynchronous context manager, which holds its connections."""

    def __init__(self, config: JudgeConfig, key: str) -> None:
        """Ask the model of `config` with `key`. Raises `NoAnswerError` if the environment's proxy cannot be used."""
        self._url = f"{config.url.rstrip('/')}/chat/completions"
        self._model = config.model
        self._key = key
        self._seconds = config.timeout_seconds
        self._failures = 0
        try:
            self._client = httpx2.AsyncClient(
                headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})},
                follow_redirects=False,
                timeout=None,  # a try as a whole has a limit, which a server that drips cannot stretch
                # No proxy reaches what listens on this machine alone.
                trust_env=not config.on_this_machine,
            )
        except (ValueError, ImportError, OSError, httpx2.InvalidURL) as error:
            message = f"the proxy or certificates of the environment cannot be used ({type(error).__name__})"
            raise NoAnswerError(message, for_all=True) from None

    async def __aenter__(self) -> Self:
        """Open the connections."""
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close them."""
        await self._client.__aexit__()

    async def ask(self, messages: Chat) -> str:
        """
        Return the text of the reply, tried as `PATIENCE` allows; the key is taken out of it, should it be there.

        Raises `NoAnswerError` if there is none; a reply that came and is no chat completion is an empty text.
        """
        body = json.dumps({"model": self._model, "messages": messages, "stream": False, **SAMPLING}).encode()
        failed = ""
        for failures in range(1, PATIENCE.tries + 1):
            if self._failures >= PATIENCE.in_all:
                raise NoAnswerError(f"{PATIENCE.in_all} tries failed in all")
            reply = await self._try(body)
            if isinstance(reply, str):
                return reply.replace(self._key, "(key)") if self._key else reply
            failed = reply.words
            self._failures += 1
            if failures < PATIENCE.tries:
                await _pause(PATIENCE.wait(failures, reply.wait))
        raise NoAnswerError(f"{failed}, {PATIENCE.tries} times")

    async def _try(self, body: bytes) -> str | _Passing:
        try:
            async with asyncio.timeout(self._seconds), self._client.stream("POST", self._url, content=body) as response:
                status, wish = response.status_code, response.headers.get("Retry-After", "")
                text = await _read(response) if status == _OK else b""
        except TimeoutError:
            return _Passing(f"no answer within {self._seconds:g} s")
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, OSError) as error:
            untrusted = "CERTIFICATE_VERIFY_FAILED" in str(error)
            return _Passing(
                "its certificate is not trusted" if untrusted else f"no connection ({type(error).__name__})"
            )
        if status == _OK:
            return _content(text)
        if status in _PASSING:
            return _Passing(f"status {status}", _seconds(wish))
        if status in _REDIRECTS:
            message = f"it redirects (status {status}), which is not followed: set judge.url to where it leads"
            raise NoAnswerError(message, for_all=True)
        remedy = _FINAL.get(status)
        message = f"status {status}: {remedy}" if remedy else f"status {status}: it does not take this question"
        raise NoAnswerError(message, for_all=remedy is not None)


async def _read(response: httpx2.Response) -> bytes:
    """Return the body; nothing of one that is larger than any verdict."""
    parts: list[bytes] = []
    size = 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > _LARGEST_REPLY:
            return b""
        parts.append(part)
    return b"".join(parts)


def _content(body: bytes) -> str:
    """Return the text in a chat completion; an empty one if it holds none."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    return content if isinstance(content, str) else ""


def _seconds(wish: str) -> float:
    """Return what a Retry-After header asks for, in seconds: a number or a date; 0 if it cannot be read."""
    if wish.isascii() and wish.isdigit():
        return float(wish)
    try:
        return max(parsedate_to_datetime(wish).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return 0.0
