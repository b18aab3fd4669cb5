"""A command that is printed can be pasted: names are quoted, and settings and track are those of the command before."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon.conftest import Ended

Command = Callable[..., Ended]


def test_a_workspace_whose_name_has_a_space(dropforge: Command, tmp_path: Path) -> None:
    said = dropforge("init", "my forge").out.splitlines()
    (enter,) = (line for line in said if line.strip().startswith("cd "))
    assert (tmp_path / shlex.split(enter)[1] / "dropforge.toml").is_file()
    (copy,) = (line for line in said if line.strip().startswith("cp "))
    assert Path(shlex.split(copy)[-1]).is_dir()


@pytest.mark.usefixtures("lived_in")
def test_a_backup_is_restored_where_it_was_made(dropforge: Command, tmp_path: Path) -> None:
    config = ("--config", str(tmp_path / "dropforge.toml"))
    made = dropforge(*config, "backup", "to keep")
    command = shlex.split(made.out.rpartition("stopped: ")[2])
    assert command[:3] == ["dropforge", *config]
    assert dropforge(*command[1:]).code == 0, "whatever the folder it is pasted in"


def test_a_table_for_another_track(dropforge: Command, tmp_path: Path) -> None:
    dropforge("init")
    with (tmp_path / "dropforge.toml").open("a") as file:
        file.write("[tracks.support]\n")
    dropforge("init")
    (tmp_path / "re cords.csv").write_text("instruction,output\n" + "".join(f"{n},{n}\n" for n in range(60)))
    said = dropforge("convert", "re cords.csv", "--track", "support", "-o", "re cords.jsonl").out
    command = shlex.split(said.rpartition("next: ")[2])
    assert command == ["dropforge", "submit", "--track", "support", "re cords.jsonl"]
    assert (
        "dropforge submit --heldout --track support FILE" in dropforge("check", "--track", "support", command[-1]).out
    )
    assert dropforge(*command[1:]).code == 0
    waits = dropforge("wait", "no file.jsonl", "--track", "support")
    assert "dropforge submit 'no file.jsonl';" in waits.err
