"""What tracks lack for their first verdict, before anything is trained for nothing to be judged on."""

from daemon.inbox.answers.remarks import metric_of_drop, too_few
from daemon.settings.model import Settings
from daemon.views.overview import Overview

_ACCEPTED = "SELECT role, sum(rows) AS rows FROM \"drop\" WHERE track = ? AND state = 'accepted' GROUP BY role"
_JUDGED = "SELECT 1 FROM run WHERE track = ? AND outcome <> 'insufficient_evidence' LIMIT 1"


def missing_rows(settings: Settings, overview: Overview, track: str | None = None) -> dict[str, str]:
    """Return by track what each lacks for its first verdict, in words; of `track` alone if it is given."""
    found = {}
    for name in settings.track_names:
        if track in {None, name} and not overview.rows(_JUDGED, name):
            rows = {row.role: row.rows for row in overview.rows(_ACCEPTED, name)}
            said = too_few(name, settings.track(name), _metric(overview, name), rows)
            if said is not None:
                found[name] = said
    return found


def _metric(overview: Overview, track: str) -> str | None:
    """Return the metric of a track, before its first run the likely one of its newest drop; `None` without any."""
    if fixed := overview.metric(track):
        return fixed
    newest = overview.drops(track, "accepted", most=1)
    return metric_of_drop(overview.folder, newest[0].sha256) if newest else None
