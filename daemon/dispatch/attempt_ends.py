"""Whether the end of an attempt counts as a failure of its run."""

from sqlalchemy import Engine

from daemon.queue import states
from daemon.settings.model import Settings
from daemon.state import run_files
from daemon.state.layout import SHARE_GONE_NOTE
from daemon.state.states import AttemptState
from daemon.state.tables import Attempt
from pipeline import durable
from pipeline.contract import StepSpec

#: Interrupted attempts in a row, without a checkpoint, after which a person has to look: every node may be preempted.
_MOST_INTERRUPTED = 10


def why_not_again(engine: Engine, settings: Settings, attempt: Attempt, spec: StepSpec) -> str:
    """Return the hint if the end of an attempt by Slurm counts as a failure, else an empty string."""
    root, run = settings.work_folder, attempt.run_id
    last = states.last_attempts(engine, run, spec.step, _MOST_INTERRUPTED)
    if run_files.made_checkpoint(root, run, attempt.started_at):
        return ""
    if run_files.was_out_of_time(spec):
        return f"its time limit came before a checkpoint: raise executor.slurm.{spec.step}.time"
    if len(last) < _MOST_INTERRUPTED or {one.state for one in last[1:]} != {AttemptState.INTERRUPTED}:
        return ""
    if run_files.made_checkpoint(root, run, last[-1].started_at):
        return ""
    return f"{_MOST_INTERRUPTED} attempts in a row left no checkpoint; see why: dropforge show {run}"


def lacked_share(engine: Engine, settings: Settings, run: int, step: str) -> bool:
    """Return whether the shared folder was gone during the last attempt at a step."""
    last = states.last_attempts(engine, run, step, 1)
    _, _, gone, _ = durable.signature(settings.state_folder / SHARE_GONE_NOTE)
    return bool(last) and gone // 1_000_000 >= last[0].started_at
