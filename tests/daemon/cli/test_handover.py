"""`dropforge export` at the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.models.manifest import model_id
from tests.chaos.house import START, Daemon, build

Command = Callable[..., Any]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace whose champion is its base model."""
    build(tmp_path)
    Daemon(tmp_path, START)
    return tmp_path


def test_the_champion_is_copied_to_a_folder_that_is_not_there(workspace: Path, dropforge: Command) -> None:
    done = dropforge("export", "--to", "out")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{workspace / 'out'}: model ")
    assert model_id(workspace / "out") == model_id(workspace / "base")
    again = dropforge("export", "--to", "out")
    assert again.code == 1
    assert f"{workspace / 'out'} is there already" in again.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--gguf",), 1, "export.gguf is not set"),
        (("nowhere",), 2, "there is no track 'nowhere'"),
    ],
)
def test_what_cannot_be_exported_is_said_with_its_remedy(
    workspace: Path, dropforge: Command, arguments: tuple[str, ...], code: int, words: str
) -> None:
    done = dropforge("export", *arguments, "--to", "out")
    assert done.code == code
    assert words in done.err
    assert "hint: " in done.err
    assert not (workspace / "out").exists()
