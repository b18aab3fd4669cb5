"""Where the page may be served."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon.settings.load import load
from daemon.settings.model import SettingsError


@pytest.fixture
def settings(tmp_path: Path) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        (tmp_path / "dropforge.toml").write_text(f"[web]\n{text}\n")
        return load(tmp_path / "dropforge.toml", {}).web

    return read


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "[::1]:8765", "127.1.2.3:80", "unix:/run/x.sock"])
def test_near_addresses_need_nothing_else(settings: Callable[[str], Any], listen: str) -> None:
    assert settings(f'listen = "{listen}"').address.is_near


@pytest.mark.parametrize("listen", ["0.0.0.0:8765", "[::]:8765", "192.168.1.2:8765", "[2001:db8::1]:80"])
def test_an_address_beyond_this_machine_needs_the_token_for_all(settings: Callable[[str], Any], listen: str) -> None:
    with pytest.raises(SettingsError, match='can be reached from other machines: that needs token = "all"'):
        settings(f'listen = "{listen}"')
    assert not settings(f'listen = "{listen}"\ntoken = "all"').address.is_near


@pytest.mark.parametrize(
    "listen",
    [
        *("", "8765", "localhost:8765", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "unix:web.sock"),
        *("::1:8765", "[::1:8765", "[127.0.0.1]:8765", "2001:db8::8a2e:370:7334"),
    ],
)
def test_what_is_no_address_is_refused_with_one_that_is(settings: Callable[[str], Any], listen: str) -> None:
    with pytest.raises(SettingsError, match=r"web.listen: .*(127.0.0.1:8765|unix:/run|65535)"):
        settings(f'listen = "{listen}"')
