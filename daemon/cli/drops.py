"""`drops`: list drops, accept a proposed drop or new answers, withdraw a drop from later runs, restore it."""

from typing import Annotated

import typer

from daemon.cli.output import (
    answers_words,
    clock,
    drop_words,
    print_json,
    print_line,
    print_lines,
    print_table,
    waiting_words,
)
from daemon.cli.workspace import (
    MOST_LISTED,
    AllOption,
    AnyReasonOption,
    JsonOption,
    ReasonOption,
    TrackOption,
    chosen_tracks,
    load_settings,
    newest_only,
    open_overview,
    open_writer,
    word_of_user,
)
from daemon.state.clauses import preview_clauses
from daemon.state.states import DropState
from daemon.views import confirmations
from daemon.views.drops import DropView

DropArgument = Annotated[int, typer.Argument(metavar="DROP", help="Number of the drop.")]


def drops(
    context: typer.Context,
    *,
    track: TrackOption = None,
    state: Annotated[DropState | None, typer.Option("--state", help="In this state only.")] = None,
    whole: AllOption = False,
    as_json: JsonOption = False,
) -> None:
    """
    List the files that were taken in, newest first: the newest 50, or with --all all of them.

    Rejected files are listed too. Without --state, tracks that lack rows for a first verdict follow, and warnings about
    the data of each track's last run.
    """
    if context.invoked_subcommand is not None:
        return
    if track is not None:
        chosen_tracks(context, track)
    overview = open_overview(context)
    views = overview.drops(track, state, None if whole else MOST_LISTED)
    if as_json:
        print_json(drops=views)
        return
    if not views:
        print_line("no drops")
    else:
        print_table(("DROP", "TRACK", "STATE", "ROWS", "RECORDS", "RUN", "RECEIVED", "NAME"), map(_row, views))
    if state is None:
        print_lines([*overview.missing_rows(load_settings(context), track).values(), *overview.data_warnings(track)])
    print_lines(newest_only(views, whole=whole))


def _row(drop: DropView) -> tuple[object, ...]:
    """
    Return a drop's row of the table, with its name and remarks in the last cell.

    Remarks are the reason for its state (or its worth), its evidence, replaced rows, new answers, and before its first
    run the champion's agreement with it.
    """
    place = f"heldout/{drop.name}" if drop.role == "heldout" else drop.name
    same = f"the same as drop {drop.duplicate_of}" if drop.duplicate_of else ""
    why = waiting_words(drop) or drop.on_trial or drop.reason or same or drop.worth
    agreement = preview_clauses(drop) if drop.first_run is None else ()
    why = "; ".join(filter(None, (why, *drop.evidence, drop.replaced, answers_words(drop), *agreement)))
    name = f"{place}: {why}" if why else place
    numbers = (drop.rows, drop.records, drop.first_run)
    return (drop.id, drop.track, drop_words(drop), *numbers, clock(drop.received_at), name)


def accept(
    context: typer.Context,
    *,
    drop: DropArgument,
    answers: Annotated[
        bool, typer.Option("--answers", help="Let its new answers to old questions replace the old ones.")
    ] = False,
    reason: AnyReasonOption = None,
) -> None:
    """
    Accept a held-out file that waits for approval, or with --answers a drop's new answers to old questions.

    A held-out file says what every later model is judged on: look at its records first. A run is queued if the track's
    last run ended for lack of them. For any other drop, or if the same content is accepted already, this is an error.

    The drop's note and its page show new answers with the old ones. From the next run on, accepted answers are used in
    training and evaluation, and the old ones are not. If the drop is withdrawn, the old ones count again.
    """
    from daemon.queue import drops as decisions  # noqa: PLC0415 - a quick start

    engine, settings = open_writer(context), load_settings(context)
    if answers:
        row = decisions.accept_answers(engine, drop, word_of_user(reason), settings)
        print_lines(confirmations.accepted_answers(open_overview(context), settings, row))
    else:
        row = decisions.accept(engine, drop, word_of_user(reason), settings)
        print_lines(confirmations.accepted(open_overview(context), settings, row))


def withdraw(context: typer.Context, *, drop: DropArgument, reason: ReasonOption) -> None:
    """
    Take a drop out of every later run.

    Its file and its history stay. Open runs and pending approvals that were made from it are cancelled; the other drops
    that were new in them wait for a run again. A queued run is cancelled if no new drop is left for it. A champion that
    was trained on it stays and is named. It is an error if the drop is rejected, a duplicate or withdrawn.
    """
    from daemon.queue.drops import withdraw as take_out  # noqa: PLC0415 - a quick start

    word = word_of_user(reason)
    done = take_out(open_writer(context), drop, word, load_settings(context))
    print_lines(confirmations.withdrawn(open_overview(context), done))


def restore(context: typer.Context, *, drop: DropArgument, reason: ReasonOption) -> None:
    """
    Put a withdrawn or suspended drop back, or a drop on trial, whose trial is then cancelled.

    It counts as new and starts a run as a new drop would; it is not put on trial again. For any other drop, or if the
    same content is accepted already, this is an error.
    """
    from daemon.queue.drops import restore as put_back  # noqa: PLC0415 - a quick start

    engine, settings = open_writer(context), load_settings(context)
    row = put_back(engine, drop, word_of_user(reason), settings)
    print_lines(confirmations.restored(open_overview(context), settings, row))
