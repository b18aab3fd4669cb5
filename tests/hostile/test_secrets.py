"""Passwords in the environment of the service, looked for by what runs as its user: a step of a stranger's model."""

import shlex
import sys

import pytest

from tests.hostile.people import DAEMON, NewBox

LOOK = """
import pathlib, sys
for found in pathlib.Path("/proc").glob("[0-9]*/environ"):
    try:
        text = found.read_bytes()
    except OSError:
        continue
    if b"DROPFORGE_STATE=" + sys.argv[1].encode() in text:
        print("seen", b"hunter2" in text)
"""


@pytest.mark.timeout(120)
def test_the_passwords_of_messages_are_in_no_environment_that_the_steps_user_can_read(new_box: NewBox) -> None:
    box = new_box('[web]\nenabled = true\nlisten = "127.0.0.1:0"\n')
    box.start(extra={"DROPFORGE_MESSAGES__URLS": '["json://u:hunter2@127.0.0.1:1/"]'})
    box.until(lambda: "worker_started" in box.said())
    look = shlex.join([sys.executable, "-c", LOOK, str(box.state)])
    seen = set(box.shell(DAEMON, look).stdout.splitlines())
    assert seen == {"seen False"}, "its own at least is seen"
