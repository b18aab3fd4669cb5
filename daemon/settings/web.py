"""Settings of the web page."""

import ipaddress
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import field_validator, model_validator

from pipeline.artifacts import Frozen

_UNIX = "unix:"
_MOST_PORT = 65_535


class Address(NamedTuple):
    """Where the page is served: the path of a Unix socket, or if `socket` is `None` an IP address and a port."""

    socket: Path | None
    host: str = ""
    port: int = 0

    @property
    def is_near(self) -> bool:
        """Whether no other machine can reach it: a socket or a loopback address."""
        return self.socket is not None or ipaddress.ip_address(self.host).is_loopback


class WebSettings(Frozen):
    """The web page; `dropforge web` shows it without these, too."""

    enabled: bool = False
    """Whether the daemon serves the page, in a process beside itself."""
    listen: str = "127.0.0.1:8765"
    """Address and port, or a socket as "unix:/run/dropforge/web.sock"."""
    token: Literal["auto", "changes", "all"] = "auto"  # noqa: S105 - a choice
    """What asks for the token: `changes`, or reading too; `auto` is `changes` on loopback, `all` on a socket."""
    hosts: tuple[str, ...] = ()
    """Further names that the page is asked for by, as those of a proxy before it; others are refused."""

    @field_validator("listen")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        address_of(value)
        return value

    @model_validator(mode="after")
    def _is_near_or_closed(self) -> "WebSettings":
        if not self.address.is_near and not self.closed:
            raise ValueError(f'{self.listen} can be reached from other machines: that needs token = "all"')
        return self

    @property
    def address(self) -> Address:
        """Where the page is served: `listen`, parsed."""
        return address_of(self.listen)

    @property
    def closed(self) -> bool:
        """Whether reading, too, needs the token: if `token` is "all", or "auto" and a socket, which a group can use."""
        return self.token == "all" or (self.token == "auto" and self.address.socket is not None)  # noqa: S105 - a choice


def address_of(text: str) -> Address:
    """Parse "IP:PORT", "[IPV6]:PORT" or "unix:/PATH"; raise `ValueError` for anything else, also for host names."""
    if text.startswith(_UNIX):
        path = Path(text.removeprefix(_UNIX))
        if not path.is_absolute():
            raise ValueError('a socket needs its whole path, as "unix:/run/dropforge/web.sock"')
        return Address(path)
    msg = f'must be an IP address with a port, 0 to {_MOST_PORT}, as "127.0.0.1:8765" or "[::1]:8765", or "unix:/PATH"'
    try:
        parts = urlsplit(f"//{text}")
        ip, port = ipaddress.ip_address(parts.hostname or ""), parts.port
    except ValueError as error:
        raise ValueError(msg) from error
    if port is None or parts.netloc != text or "@" in text:
        raise ValueError(msg)
    return Address(None, str(ip), port)
