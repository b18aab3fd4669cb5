"""Where messages go: addresses that hold passwords and tokens, so that none is ever shown as it is."""

import re
from hashlib import sha256
from urllib.parse import urlsplit

from pydantic import SecretStr, field_validator

from pipeline.artifacts import Frozen

#: Schemes whose URL has a host behind `://`; that of the others begins with a token (slack, tgram, ntfy, pbul).
_WITH_HOST = frozenset(
    {"form", "forms", "gotify", "gotifys", "http", "https", "json", "jsons", "mailto", "mailtos", "xml", "xmls"}
)
#: Enough digits to tell a few addresses apart, too few to try passwords by.
_DIGITS = 4


class SecretUrl(SecretStr):
    """A URL of which only scheme and host are shown."""

    def _display(self) -> str:
        return shown_url(self.get_secret_value())

    @property
    def address(self) -> str:
        """What the database has in its place: the first four hexadecimal digits of its SHA-256."""
        return sha256(self.get_secret_value().encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]


class MessageSettings(Frozen):
    """Where messages are sent, and when the digest; a service needs PrivateNetwork=no to send them."""

    urls: tuple[SecretUrl, ...] = ()
    """Addresses as Apprise has them, as ["mailto://user:password@example.org", "slack://TOKEN"]; [] sends nothing."""
    digest: str = "08:00"
    """Time of day, in `timezone`, at which events without a message of their own are sent as a digest; empty: never."""

    @field_validator("urls")
    @classmethod
    def _are_addresses(cls, value: tuple[SecretUrl, ...]) -> tuple[SecretUrl, ...]:
        if any("://" not in url.get_secret_value() for url in value):
            raise ValueError("must be URLs as Apprise writes them, such as mailto://user:password@example.org")
        if len(set(value)) < len(value):
            raise ValueError("one of them is there twice")
        if len({url.address for url in value}) < len(value):
            raise ValueError("two of them have the same short hash: add ?n=1 to one of them")
        return value

    @field_validator("digest")
    @classmethod
    def _is_a_time_of_day(cls, value: str) -> str:
        if not re.fullmatch(r"(?:([01]?[0-9]|2[0-3]):[0-5][0-9])?", value):
            raise ValueError('must be a time of day, such as "08:00", or "" for no digest')
        return value

    @property
    def schedule(self) -> str:
        """The digest's time as a cron expression; empty where there is none."""
        hour, _, minute = self.digest.partition(":")
        return f"{int(minute)} {int(hour)} * * *" if self.digest else ""


def shown_url(url: str) -> str:
    """Return a URL without secrets: its scheme, and its host if it certainly has one, else "…"; empty if not a URL."""
    scheme, there, rest = url.partition("://")
    if not there:
        return ""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    # A password may hold these characters: then it ends behind them.
    cut = "@" not in authority and "@" in rest
    try:
        host = None if cut or scheme.lower() not in _WITH_HOST else urlsplit(f"//{authority}").hostname
    except ValueError:
        host = None
    return f"{scheme}://{host}" if host else f"{scheme}://…"
