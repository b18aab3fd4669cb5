"""
What a person does on the page or through the API, by the functions that the command line calls.

Forms (POST, urlencoded) of the pages; each is answered with `done.html`: `words`, a list of sentences, and `back`, the
path to go on from; or with `error.html`.

    /runs/ID/cancel            /runs/ID/retry   since (a step, may be empty)
    /runs/ID/move              after (a run, or empty: before all others)
    /runs/ID/promote           reason (empty: approve a win that waits; else by force)
    /tracks/NAME/pause         reason
    /tracks/NAME/resume
    /tracks/NAME/rollback      reason, to (a generation, or empty)
    /drops/ID/accept           reason (may be empty)
    /drops/ID/withdraw         reason
    /drops/ID/restore          reason

The API has the same below `/api/v1`, with a JSON body of the same fields, and answers `{"words": [...]}`.
"""

from fastapi import APIRouter

router = APIRouter(tags=["act"])
forms = APIRouter()
