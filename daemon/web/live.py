"""
Events for an open page, at GET /api/v1/live (text/event-stream).

`changed` when anything in the database is not what it was: `{"event": 123}`, the latest event's number. `progress`
when the run that is worked on is further: a LiveRun as JSON, or null when none is.
"""

from fastapi import APIRouter

router = APIRouter(tags=["read"])
