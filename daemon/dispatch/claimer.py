"""Queue the trials that are due, then claim each due run whose settings, files and disk space let it go on."""

import contextlib

import structlog
from sqlalchemy import Engine
from sqlmodel import Session

from daemon.champions.hooks.training import TrainingHooks
from daemon.dispatch.step_specs import compose, warn_of_fixed
from daemon.dispatch.upkeep import Upkeep
from daemon.queue import leave_one_out, order, run_queue, states, suspects
from daemon.settings.model import Settings
from daemon.state import run_files
from daemon.state.database import ChangeWatch, transaction
from daemon.state.ownership import require_share
from daemon.state.states import RunState
from daemon.state.tables import Run
from daemon.state.troubles import Troubles, concerns_all, in_words
from daemon.storage.disk_estimate import needed_bytes, still_needed
from daemon.system.programs import user
from pipeline.config import RunConfig
from pipeline.errors import DropforgeError

_HOUR_MS = 3_600_000
log = structlog.get_logger()


class Claimer:
    """Claims due runs until `executor.parallel` are claimed."""

    def __init__(
        self, engine: Engine, settings: Settings, troubles: Troubles, upkeep: Upkeep, gpu: TrainingHooks
    ) -> None:
        """Note errors of tracks in `troubles`; `upkeep` checks disk and base models, `gpu` whether a server waits."""
        self._engine = engine
        self._settings = settings
        self._troubles = troubles
        self._upkeep = upkeep
        self._gpu = gpu
        self._leaving_out = leave_one_out.tracks_of(settings)
        self._looked = (0, 0)
        self._changes = ChangeWatch(engine)
        #: When the next run is due, and the time of the last query for due runs: the clock may be set back.
        self._due: int | None = None
        self._asked_at = 0

    def claim_due(self, now: int, claims: dict[int, states.Claim], *, low: bool) -> None:
        """
        Queue due trials and leave-one-out runs; unless the disk is `low`, claim due runs into `claims`, to the limit.

        Does nothing if the database has not changed since the last call and no run came due. While a run is claimed and
        a server waits for the GPU, no further run is claimed. Raises as `_claim_next`.
        """
        # Called twice a second: query the database only if the answer can differ from the last one.
        later = now >= self._asked_at and (self._due is None or now < self._due)
        if later and not self._changes.changed():
            return
        self._asked_at = now
        self._due = now  # should the claim fail, on a full disk say, it is tried again
        suspects.go_on(self._engine, self._settings, now, self._troubles)
        self._looked = leave_one_out.go_on(
            self._engine, self._settings, self._leaving_out, now, self._troubles, self._looked
        )
        needs: dict[str, int] = {}
        while len(claims) < self._settings.executor.parallel:
            # Else runs that overlap would keep the GPU for good from the server that is to take a new champion.
            waits = bool(claims) and self._gpu.keeps_server_waiting()
            claim = None if low or waits else self._claim_next(now, claims, needs)
            if claim is None:
                # An hour at most: trials leave the budget of seven days without a change in the database.
                self._due = min(order.next_due(self._engine) or now + _HOUR_MS, now + _HOUR_MS)
                return
            claims[claim.run_id] = claim
            log.info("run_claimed", run=claim.run_id)

    def _claim_next(self, now: int, claims: dict[int, states.Claim], needs: dict[str, int]) -> states.Claim | None:
        """
        Claim the first due run that can begin or continue and return its claim; `None` if there is none.

        The due runs before it are postponed, each with its error, or cancelled if they have no training drop. `needs`
        are the bytes that the runs in `claims` still need, by "run NUMBER"; missing ones are added. Raises `ShareGone`,
        and errors that concern all runs.
        """
        root = self._settings.work_folder
        with transaction(self._engine) as session:
            for run in order.due_runs(session, now):
                self._add_needs(session, claims, needs)
                try:
                    if run.config is None:
                        config = self._config_of(session, run, now)
                        self._upkeep.disk.require(needed_bytes(config) | needs)
                        if not run_queue.begin(session, run, config, now):
                            continue
                    if run.state == RunState.WAITING:
                        self._upkeep.disk.require(still_needed(root, run) | needs)
                except Exception as error:  # one run's files or row must not keep the others from their turn
                    require_share(self._settings)
                    if concerns_all(error):
                        raise
                    why = error if isinstance(error, DropforgeError) else unusable(self._settings, run.id or 0, error)
                    run_queue.postpone(session, run, why, now)
                else:
                    require_share(self._settings)
                    return run_queue.claim(session, run, now)
        return None

    def _config_of(self, session: Session, run: Run, now: int) -> RunConfig:
        """
        Return the configuration of a run that begins now; a control has that of its trial. Adds a missing track's row.

        Raises `DropforgeError` if the track is not in the settings or its base model cannot be used.
        """
        track = states.ensure_track(session, run.track, now)
        problem = self._upkeep.bases.problem(track.name)
        if problem is not None:
            raise problem
        trial = None if run.control_of is None else session.get_one(Run, run.control_of)
        config = compose(self._settings, track) if trial is None else RunConfig.model_validate(trial.config)
        warn_of_fixed(self._settings, track)
        return config

    def _add_needs(self, session: Session, claims: dict[int, states.Claim], needs: dict[str, int]) -> None:
        for run_id in claims:
            if f"run {run_id}" not in needs:
                run = session.get_one(Run, run_id)
                with contextlib.suppress(DropforgeError, OSError, ValueError):  # its next step says so
                    needs[f"run {run_id}"] = sum(still_needed(self._settings.work_folder, run).values())


def unusable(settings: Settings, run_id: int, error: Exception) -> DropforgeError:
    """Return the error, with a hint, of a run whose own files cannot be used because of `error`."""
    message = f"the files of run {run_id} cannot be used: {in_words(error)}"
    folder = run_files.run_folder(settings.work_folder, run_id)
    hint = (
        f"let {user()}, that the daemon runs as, own all of {folder}: the run then goes on by itself; "
        f"or end it: dropforge cancel {run_id}"
    )
    return DropforgeError(message, hint)
