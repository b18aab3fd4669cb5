"""The page as a process of its own: on a port, on a socket, beside a daemon that does not care."""

import http.client
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from daemon.settings.sections import address_of
from daemon.views.overview import Overview
from daemon.web.security import load_token
from daemon.web.server import listen
from pipeline.errors import DropforgeError
from tests.slurm.cluster import wait_for

ENDED = 60
PAGE = [sys.executable, "-P", "-m", "daemon", "web"]


def answers_now(path: Path) -> bool:
    try:
        return status(path, "/static/style.css") == 200
    except OSError:
        return False


def answers(path: Path) -> bool:
    """Say that the page at a socket answers, once it does."""
    wait_for(lambda: answers_now(path))
    return True


def page_of(daemon: int) -> int:
    """Return the number of the page's process that a daemon has started; 0 if there is none."""
    for children in Path(f"/proc/{daemon}/task").glob("*/children"):
        for child in children.read_text().split():
            if b"web" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
                return int(child)
    return 0


def at(address: str) -> dict[str, str]:
    """Return our environment with the address of the page."""
    return {**os.environ, "DROPFORGE_WEB__LISTEN": address}


@contextmanager
def page(folder: Path, address: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start `dropforge web`; give the process and the first line that it prints, once it listens."""
    with subprocess.Popen(
        PAGE,
        cwd=folder,
        env=at(address),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def status(where: str | Path, path: str = "/", **headers: str) -> int:
    """Ask the page at a host and port, or a socket, and return the answer's status."""
    with closing(http.client.HTTPConnection("localhost" if isinstance(where, Path) else where)) as connection:
        if isinstance(where, Path):
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(str(where))
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status


def test_it_prints_the_address_that_opens_it(lived_in: Any) -> None:
    with page(lived_in.folder, "127.0.0.1:0") as (process, line):
        address, token = line.split()[-1].split("/?token=")
        assert token == load_token(lived_in.settings.state_folder)
        where = address.removeprefix("http://")
        assert status(where) == 200
        assert status(where, f"/?token={token}") == 303
        assert status(where, host="evil.example") == 421
        with closing(http.client.HTTPConnection(where)) as connection:
            connection.request("GET", "/api/v1/live")
            with connection.getresponse() as events:
                assert events.headers["content-type"].startswith("text/event-stream")
                assert events.readline() == b"event: changed\n"
                # It ends in order though somebody listens still.
                process.send_signal(signal.SIGTERM)
                while events.readline():
                    pass  # until the stream ends, as one does that is not cut off
                assert process.wait(ENDED) in {0, -signal.SIGTERM}
                assert process.stdout is not None
                assert process.stdout.read() == "", "nothing is said of a page that was open"
    assert Overview.of(lived_in.settings).run(3).state == "running"


def test_a_socket_is_for_the_daemons_user_and_group(lived_in: Any) -> None:
    path = lived_in.folder / "web.sock"
    for _ in range(2):  # the second takes the place of what the first, killed, has left
        with page(lived_in.folder, f"unix:{path}") as (_process, line):
            assert str(path) in line
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            assert status(path) == 403, "a member of the group may not read what others dropped"
            token = load_token(lived_in.settings.state_folder)
            assert status(path, authorization=f"Bearer {token}") == 200
    assert path.is_socket()


def begin(path: Path, said: str) -> socket.socket:
    """Connect to a socket and say something; what it answers is waited for a minute at most."""
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(ENDED)
    made.connect(str(path))
    made.sendall(said.encode())
    return made


def is_cut(one: socket.socket) -> bool:
    """Say that the page has ended a connection, once it has."""
    try:
        while one.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


def test_half_requests_without_end_keep_nobody_out_and_fill_no_log(
    lived_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROPFORGE_WEB__TOKEN", "changes")  # else a socket's reader needs the token
    path, reader = lived_in.folder / "web.sock", "GET /static/page.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with page(lived_in.folder, f"unix:{path}") as (process, _), ExitStack() as opened:
        working = opened.enter_context(begin(path, reader.replace("GET /static/page.js", "GET /api/v1/live")))
        assert working.recv(15) == b"HTTP/1.1 200 OK"
        halves: list[socket.socket] = []
        for _ in range(300):
            halves += [opened.enter_context(begin(path, "GET / HTTP/1.1\r\n")) for _ in range(2)]
            assert opened.enter_context(begin(path, reader)).recv(15) == b"HTTP/1.1 200 OK"
        opened.enter_context(begin(path, "no request at all\r\n\r\n"))
        assert all(is_cut(one) for one in halves[:400]), "what has asked for nothing the longest"
        assert status(path) == 200
        working.settimeout(0)
        with suppress(BlockingIOError):
            assert working.recv(1 << 16) != b"", "who listens to events is not cut for it"
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert len(process.stdout.read().splitlines()) <= 2, "a line a minute for each thing that is wrong"


def test_a_request_that_does_not_come_is_not_waited_for(lived_in: Any) -> None:
    path = lived_in.folder / "web.sock"
    whole = "GET /static/page.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
    quick = "import sys; from daemon import cli; from daemon.web import server; server._REQUEST_SECONDS = 0.5; "
    argv = [sys.executable, "-P", "-c", f"{quick}sys.exit(cli.main())", "web"]
    with subprocess.Popen(argv, cwd=lived_in.folder, env=at(f"unix:{path}"), stdout=subprocess.DEVNULL) as process:
        try:
            assert answers(path)
            for said in ("", "GET / HTTP/1.1\r\nHost: ", f"{whole}GET / HTTP/1.1\r\nHost: "):
                with begin(path, said) as one:
                    assert is_cut(one)
        finally:
            process.kill()


def test_of_too_many_event_streams_the_oldest_ends_and_an_upload_that_breaks_off_leaves_nothing(
    lived_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROPFORGE_WEB__TOKEN", "changes")  # else a socket's reader needs the token
    path, inbox = lived_in.folder / "web.sock", lived_in.settings.inbox_folder
    asks = "GET /api/v1/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    upload = (
        "POST /api/v1/upload HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {load_token(lived_in.settings.state_folder)}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="file"; filename="half.jsonl"\r\n\r\n{"instruction"'
    )
    with page(lived_in.folder, f"unix:{path}"), ExitStack() as opened:
        streams = []
        for _ in range(52):
            streams.append(opened.enter_context(begin(path, asks)))
            assert streams[-1].recv(15) == b"HTTP/1.1 200 OK"
        assert is_cut(streams[0])
        assert is_cut(streams[1])
        with begin(path, upload) as broken:
            broken.shutdown(socket.SHUT_WR)
            while broken.recv(4096):
                pass
        assert status(path) == 200
    assert not [*inbox.rglob("half*"), *inbox.rglob(".*.part")]


def test_the_daemon_starts_it_again_is_not_touched_by_its_death_and_takes_it_along(lived_in: Any) -> None:
    path = lived_in.folder / "web.sock"
    text = (lived_in.folder / "dropforge.toml").read_text()
    (lived_in.folder / "dropforge.toml").write_text(f'{text}[web]\nenabled = true\nlisten = "unix:{path}"\n')
    lived_in.engine.dispose()
    argv = [sys.executable, "-P", "-m", "daemon", "run"]
    with subprocess.Popen(argv, cwd=lived_in.folder, stderr=subprocess.DEVNULL) as daemon:
        try:
            assert answers(path)
            before = page_of(daemon.pid)
            os.kill(before, signal.SIGKILL)
            wait_for(lambda: page_of(daemon.pid) not in {0, before})
            assert answers(path)
            assert Overview.of(lived_in.settings).daemon().pid == daemon.pid
            daemon.kill()
            wait_for(lambda: not answers_now(path))
        finally:
            daemon.kill()


def test_an_address_that_is_taken_is_named(tmp_path: Path) -> None:
    with listen(address_of("127.0.0.1:0")) as first:
        port = first.getsockname()[1]
        with pytest.raises(DropforgeError, match=f"127.0.0.1:{port}: Address already in use"):
            listen(address_of(f"127.0.0.1:{port}"))
    with listen(address_of(f"unix:{tmp_path}/s")), pytest.raises(DropforgeError, match="Address already in use"):
        listen(address_of(f"unix:{tmp_path}/s"))
    (tmp_path / "file").touch()
    with pytest.raises(DropforgeError, match="Address already in use"):
        listen(address_of(f"unix:{tmp_path}/file"))
    assert (tmp_path / "file").exists()


def test_the_address_alone_is_printed_for_a_page_that_the_daemon_serves(
    dropforge: Callable[..., Any], tmp_path: Path
) -> None:
    dropforge("init", ".")
    said = dropforge("web", "--url").out
    token = load_token(tmp_path / ".dropforge")
    assert said == f"http://127.0.0.1:8765/?token={token}\n"
