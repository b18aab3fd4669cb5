"""What tracks lack for their first verdict, before anything is trained for nothing to be judged on."""

from daemon.inbox.answers.remarks import metric_of_track, too_few
from daemon.settings.model import Settings
from daemon.state.questions import ACCEPTED_ROWS, METRIC
from daemon.views.overview import Overview

_JUDGED = "SELECT 1 FROM run WHERE track = ? AND outcome <> 'insufficient_evidence' LIMIT 1"


def missing_rows(settings: Settings, overview: Overview, track: str | None = None) -> dict[str, str]:
    """Return by track what each lacks for its first verdict, in words; of `track` alone if it is given."""
    found = {}
    for name in settings.track_names:
        if track in {None, name} and not overview.rows(_JUDGED, name):
            rows = {row.role: row.rows for row in overview.rows(ACCEPTED_ROWS, track=name)}
            metric = metric_of_track(overview.folder, next(iter(overview.rows(METRIC, track=name)), None))
            said = too_few(name, settings.track(name), metric, rows)
            if said is not None:
                found[name] = said
    return found
