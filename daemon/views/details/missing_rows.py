"""What tracks lack for their first verdict, before anything is trained for nothing to be judged on."""

from daemon.inbox.answers.remarks import too_few
from daemon.settings.model import Settings
from daemon.views.overview import Overview

_ACCEPTED = "SELECT role, sum(rows) AS rows FROM \"drop\" WHERE track = ? AND state = 'accepted' GROUP BY role"
_JUDGED = "SELECT 1 FROM run WHERE track = ? AND outcome <> 'insufficient_evidence' LIMIT 1"


def missing_rows(settings: Settings, overview: Overview) -> dict[str, str]:
    """Return by track, of those without any verdict so far and without rows enough for one, what it lacks in words."""
    found = {}
    for name in settings.track_names:
        if not overview.rows(_JUDGED, name):
            rows = {row.role: row.rows for row in overview.rows(_ACCEPTED, name)}
            said = too_few(name, settings.track(name), overview.metric(name), rows)
            if said is not None:
                found[name] = said
    return found
