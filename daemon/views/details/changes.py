"""What a run did otherwise than the run that made the champion which it was compared with."""

from daemon.state.questions import MAKER
from daemon.views.compare_runs import Setting, differing_settings
from daemon.views.overview import NotThere, Overview, RunDetail
from pipeline.artifacts import Frozen


class Changes(Frozen):
    """Settings in which a run differs from the one that made a champion."""

    against: int
    """That run."""
    settings: tuple[Setting, ...]
    """`first` is the champion's, `second` this run's."""


def changes_since_champion(overview: Overview, run: RunDetail) -> Changes | None:
    """Compare the settings of `run` with those of its champion's run; `None` for a base model or without settings."""
    made = _champions_run(overview, run)
    if run.config is None or made is None or made == run.id:
        return None
    try:
        champion = overview.run(made)
    except NotThere:
        return None
    return Changes(against=made, settings=tuple(differing_settings(overview, champion, run)))


def _champions_run(overview: Overview, run: RunDetail) -> int | None:
    """Return the run that made the champion which a run was compared with, or, before its verdict, today's."""
    if run.verdict is not None and run.verdict.champion_model_id is not None:
        found: int | None = overview.rows(MAKER, track=run.track, model=run.verdict.champion_model_id)[0].run
        return found
    serving = overview.champion(run.track)
    return None if serving is None else serving.run
