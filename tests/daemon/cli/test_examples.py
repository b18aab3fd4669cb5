"""Each command's help ends with examples, and each of them is a command that can be given."""

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from daemon.cli import app
from daemon.cli.commands import COMMANDS, EXAMPLES

ROOT: Any = get_command(app)
for each in COMMANDS:
    ROOT.get_command(None, each)


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if not getattr(command, "commands", None):
        yield " ".join(path), command
    for name, below in getattr(command, "commands", {}).items():
        yield from leaves(below, (*path, name))


LEAVES = dict(leaves(ROOT))


def parsed(example: str) -> str:
    """Parse an example as the program would, without running it; return the command that it is of."""
    words = shlex.split(example, comments=True)
    if "$(dropforge" in example:
        words = shlex.split(example.partition("$(")[2].rstrip(")"))
    elif "|" in words or "&&" in words:
        words = words[: next(place for place, word in enumerate(words) if word in {"|", "&&"})]
    assert words[0] == "dropforge", example
    path: list[str] = []
    command, context = ROOT, None
    rest = words[1:]
    while True:
        context = command.make_context(words[0], rest, parent=context)
        if not getattr(command, "commands", None):
            return " ".join(path)
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        path.append(name)


def test_the_list_of_commands_says_what_each_commands_own_help_says() -> None:
    assert set(ROOT.commands) == set(COMMANDS)
    for name, (_module, words) in COMMANDS.items():
        assert " ".join(ROOT.commands[name].help.split()).startswith(words.removesuffix(".")), name


def test_every_command_has_an_example_and_every_example_a_command() -> None:
    assert set(EXAMPLES) == set(LEAVES)


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_its_help_shows_its_examples_whole_and_they_can_be_given(name: str) -> None:
    context = LEAVES[name].make_context("x", [], parent=None, resilient_parsing=True)
    context.info_name = f"dropforge {name}"
    shown = LEAVES[name].get_help(context)
    assert "\n  Examples:\n" in shown
    for example in EXAMPLES[name]:
        assert f"    {example}\n" in f"{shown}\n"
        assert len(example) <= 100
        assert parsed(example) == name


@pytest.mark.parametrize(
    ("words", "missing"),
    [(("rollback",), "'--reason'"), (("ask",), "'PROMPT'"), (("show",), "'RUN'"), (("drops", "accept"), "'DROP'")],
)
def test_what_is_missing_is_told_with_an_example(dropforge: Any, words: tuple[str, ...], missing: str) -> None:
    ended = dropforge(*words)
    path = " ".join(words)
    assert (ended.code, missing in ended.err) == (2, True)
    assert ended.err.splitlines()[1] == (
        f"hint: for example: {EXAMPLES[path][0]}; see how it is used: dropforge {path} --help"
    )
