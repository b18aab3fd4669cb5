"""
Actions of the page and the API; each calls the function that the command calls.

A form (POST, urlencoded) of a page has the path and the fields of the API's action, without `/api/v1`, and is answered
with `done.html`: `words`, a list of sentences, and `back`, the path to go on from; or with `error.html`. A judgement is
answered with the review's next pair. An action raises `DropforgeError` if its run or drop is unknown or its state does
not allow the action: 409. An unknown track or entry is 404, as `server` says of all errors.
"""

import re
from typing import Annotated, Literal, Self

from fastapi import APIRouter, Path, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse, Response
from fastapi.routing import APIRoute
from pydantic import Field, StringConstraints, ValidationError, model_validator

from daemon.champions import blind_review, decisions
from daemon.champions.decisions import rollback
from daemon.champions.smoke_test import require_answer
from daemon.dispatch import stale_steps
from daemon.queue import drops, order, run_queue
from daemon.state.events import Word
from daemon.system.clock import now_ms
from daemon.system.programs import who
from daemon.views import attention, confirmations
from daemon.views.reader import NotThere
from daemon.web.pages import require_track
from daemon.web.site import MOST, Number, SiteOf, draw
from pipeline.artifacts import Frozen

router = APIRouter(tags=["act"])
forms = APIRouter()
_LONGEST = 2000
_MOST_FIELDS = 10
#: Every number that the database has.
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")
Text = Annotated[str, StringConstraints(strip_whitespace=True, max_length=_LONGEST)]
Reason = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=_LONGEST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Name = Annotated[str, Path(min_length=1, max_length=200)]


class Done(Frozen):
    """The answer to an action: sentences that confirm it."""

    words: tuple[str, ...]


class Why(Frozen):
    """A required reason, which is recorded."""

    reason: Reason


class PerhapsWhy(Frozen):
    """An optional reason, which is recorded."""

    reason: Text = ""


class Promote(PerhapsWhy):
    """How a run's model is promoted, and the reason."""

    force: bool = False
    """Promote whatever the verdict, also a blocked model or one under review; needs a reason."""

    @model_validator(mode="after")
    def _force_has_a_reason(self) -> Self:
        if self.force and not self.reason:
            raise ValueError("force needs a reason")
        return self


class From(Frozen):
    """From which step a run is repeated."""

    since: str | None = Field(default=None, max_length=40)
    """First step to repeat, with all later ones; `null`: only the steps that are out of date."""


class Judged(Frozen):
    """One pair of a blind review, and the judgement."""

    pair: Annotated[str, Field(min_length=1, max_length=64)]
    key: Literal["1", "2", "0", "u"]
    """The better answer: first, second or neither; `u` withdraws the judgement of the pair."""


class Back(Frozen):
    """The former champion to serve again, and the reason."""

    reason: Reason
    to: Count | None = None
    """Generation to serve again; `null`: the latest of another model, if that is not blocked, unhealthy or gone."""


@router.post("/runs/{run_id}/cancel")
def cancel(site: SiteOf, run_id: Number) -> Done:
    """
    Cancel a queued or waiting run, or a win that waits for approval; ask a running run to stop, after a checkpoint.

    An error if it has ended otherwise.
    """
    state = run_queue.cancel(site.writer(), run_id, now_ms())
    return _done(confirmations.cancelled(run_id, state))


@router.post("/runs/{run_id}/retry")
def retry(site: SiteOf, run_id: Number, body: From) -> Done:
    """Continue a failed, cancelled or crashed run where it stopped or from step `since`, with the current settings."""
    return _done(stale_steps.retry(site.writer(), site.settings.work_folder, run_id, now_ms(), body.since))


@router.post("/runs/{run_id}/move")
def move(site: SiteOf, run_id: Number) -> Done:
    """Put a queued or waiting run first in the queue; it still waits for its earliest start. Return the new order."""
    return _done(confirmations.moved(order.move_first(site.writer(), run_id, now_ms(), _who())))


@router.post("/runs/{run_id}/promote")
def promote(site: SiteOf, run_id: Number, body: Promote) -> Done:
    """
    Make the model of a run that waits for approval the champion; with `force` that of any ended run with a model.

    The model's files are checked first; with `force`, which needs a reason, it is also loaded, which can take minutes.
    Without `force` it is an error if the champion has changed since the verdict, the model was rolled back from, or a
    required blind review is not complete. The track's other runs no longer wait for approval. The daemon runs the
    hooks later.
    """
    engine, root, word = site.writer(), site.settings.work_folder, _word(body.reason)
    if body.force:
        row = decisions.force(engine, root, run_id, word, try_out=require_answer)
    else:
        row = decisions.approve(engine, root, run_id, word)
    return _done(*confirmations.promoted(row))


@router.post("/runs/{run_id}/review")
def judge_blind(site: SiteOf, run_id: Number, body: Judged) -> Done:
    """
    Record a judgement of one pair of a run's blind review, or withdraw it; return how many pairs are judged.

    A second judgement of a pair changes nothing until the first is withdrawn. The judgement of the last pair completes
    the review: its result is added to the report and is final.
    """
    choice = blind_review.Choice(body.pair, body.key, now_ms(), _who())
    review = blind_review.choose(site.writer(), site.settings.work_folder, run_id, choice)
    return _done(f"{review.judged} of {review.asked} pairs are judged")


@router.post("/tracks/{name}/pause")
def pause(site: SiteOf, name: Name, body: Why) -> Done:
    """Pause a declared track: no run begins, a running one goes on. An error if it is paused already."""
    site.settings.track(name)
    order.pause(site.writer(), name, _word(body.reason))
    return _done(confirmations.paused(name))


@router.post("/tracks/{name}/resume")
def resume(site: SiteOf, name: Name, body: PerhapsWhy) -> Done:
    """Resume a paused track, so that its runs begin again. An error if it is not paused."""
    order.resume(site.writer(), name, _word(body.reason))
    return _done(confirmations.resumed(name))


@router.post("/tracks/{name}/rollback")
def roll_back(site: SiteOf, name: Name, body: Back) -> Done:
    """Make a former champion serve again, after it was checked and loaded (minutes), and block the replaced model."""
    require_track(site, name)
    root, word = site.settings.work_folder, _word(body.reason)
    row = rollback(site.writer(), root, name, word, to=body.to, try_out=require_answer)
    return _done(*confirmations.rolled_back(row))


@router.post("/drops/{drop_id}/accept")
def accept(site: SiteOf, drop_id: Number, body: PerhapsWhy) -> Done:
    """Accept a proposed held-out file: if `gate.on` is "pinned", later models are judged on it."""
    row = drops.accept(site.writer(), drop_id, _word(body.reason), site.settings)
    return _done(*confirmations.accepted(site.overview, site.settings, row))


@router.post("/drops/{drop_id}/accept-answers")
def accept_answers(site: SiteOf, drop_id: Number, body: PerhapsWhy) -> Done:
    """
    Let a drop's new answers to questions of earlier drops replace the old ones from the next run on.

    If a run has used the drop already, a new run is queued, unless the track runs at night.
    """
    row = drops.accept_answers(site.writer(), drop_id, _word(body.reason), site.settings)
    return _done(*confirmations.accepted_answers(site.overview, site.settings, row))


@router.post("/drops/{drop_id}/withdraw")
def withdraw(site: SiteOf, drop_id: Number, body: Why) -> Done:
    """
    Remove a drop from all later runs; unfinished runs and pending wins made from it are cancelled.

    The other new drops of the cancelled runs wait for a new run. A champion trained on it keeps serving.
    """
    done = drops.withdraw(site.writer(), drop_id, _word(body.reason), site.settings)
    return _done(*confirmations.withdrawn(site.overview, done))


@router.post("/drops/{drop_id}/restore")
def restore(site: SiteOf, drop_id: Number, body: Why) -> Done:
    """Accept a withdrawn or suspended drop, or a drop on trial, as if it were new; its trial is cancelled."""
    row = drops.restore(site.writer(), drop_id, _word(body.reason), site.settings)
    return _done(*confirmations.restored(site.overview, site.settings, row))


@router.post("/attention/{key}/dismiss")
def dismiss(site: SiteOf, key: Name) -> Done:
    """Dismiss the entry of `attention` with this `key` until it happens again; a lasting condition for a day."""
    left_out = attention.dismiss(site.writer(), site.settings, site.overview, key, _word(""))
    return _done(confirmations.dismissed(left_out))


#: By the two words of a form's path, as of the API's: the action, and the model of its body if it has one.
_ACTIONS = {
    (route.path.split("/")[1], route.path.split("/")[3]): (route.endpoint, route.endpoint.__annotations__.get("body"))
    for route in router.routes
    if isinstance(route, APIRoute)
}


@forms.post("/{kind}/{target}/{action}")
async def by_form(request: Request, site: SiteOf, kind: str, target: str, action: str) -> Response:
    """
    Run the action that a form's path names and render `done.html`; after a judgement, redirect to the review.

    Empty fields count as not given. Raises `NotThere` for an unknown action, `RequestValidationError` for wrong fields.
    """
    act, model = _ACTIONS.get((kind, action), (None, None))
    numbered = kind in {"runs", "drops"}
    if act is None or (numbered and not _NUMBER.fullmatch(target)):
        raise NotThere(f"there is no {kind}/{target}/{action}", "go back to the page before")
    given = await request.form(max_files=0, max_fields=_MOST_FIELDS)
    fields = {name: value for name, value in given.items() if value != ""}
    try:
        body = [] if model is None else [model.model_validate(fields)]
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from error
    done = await run_in_threadpool(act, site, int(target) if numbered else target, *body)
    if act is judge_blind:
        return RedirectResponse(f"/runs/{target}/review", status_code=303)
    back = "/" if act is dismiss else f"/{kind}/{target}"
    return draw(request, "done.html", {"words": done.words, "back": back})


def _done(*words: str) -> Done:
    return Done(words=tuple(filter(None, words)))


def _word(reason: str) -> Word:
    return Word(reason, now_ms(), _who())


def _who() -> str:
    """Return "USER, on the page" for records: all holders of the token act as the user that the page runs as."""
    return f"{who()}, on the page"
