"""Slurm's commands, and what they say when they fail."""

import os
import subprocess

from pipeline.errors import DropforgeError

#: Longest wait for one command.
_SECONDS = 30.0
_DEFAULTS = ("SBATCH_", "SQUEUE_", "SCANCEL_")


class CannotAsk(DropforgeError):
    """A Slurm command failed or gave no answer: nothing is known, so no job counts as gone."""


def ask(*command: str, stdin: str = "") -> str:
    """
    Return the standard output of a Slurm command, run without SQUEUE_* and the like.

    Raises `CannotAsk` if it cannot be started, ends with an error or takes longer than 30 s.
    """
    # A person's own defaults, as SQUEUE_PARTITION, would hide jobs.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_DEFAULTS)}
    try:
        done = subprocess.run(  # noqa: S603 - an argument list of our own, never a shell
            command,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotAsk(f"{command[0]}: {error}", "see whether Slurm runs: scontrol ping") from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        messages = (line.removeprefix(f"{command[0]}: error: ") for line in lines if not line.startswith("*"))
        raise CannotAsk(f"{command[0]}: {'; '.join(messages)[:500]}")
    return done.stdout


def is_number(text: str) -> bool:
    """Return whether a text is the number of a job: 1 to 18 digits of ASCII."""
    return text.isascii() and text.isdigit() and len(text) < 19  # noqa: PLR2004


def job_number(output: str) -> int:
    """Return the job's number from what `sbatch --parsable` printed. Raises `CannotAsk` if there is none."""
    # "NUMBER" or "NUMBER;CLUSTER"; a site's wrapper may say more before it.
    number = output.strip().rpartition("\n")[2].partition(";")[0]
    if not is_number(number):
        raise CannotAsk(f"sbatch said no job's number: {output.strip()[:200]}")
    return int(number)
