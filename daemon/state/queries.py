"""Queries of rows that more than one place needs; `questions` has those that commands without SQLAlchemy use, too."""

from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import ScalarResult, TextClause, text
from sqlmodel import Session, col, select

from daemon.state.questions import AWAITS_APPROVAL
from daemon.state.states import PromotionKind
from daemon.state.tables import Promotion, Suspect

if TYPE_CHECKING:
    from sqlmodel.sql.expression import SelectOfScalar

T = TypeVar("T")


def rows_of(session: Session, table: type[T], question: str, **values: object) -> ScalarResult[T]:
    """Return an iterator over the rows of `table` that `question`, SQL with `values` as its parameters, selects."""
    return session.scalars(select(table).from_statement(text(question)), values)


def waits() -> TextClause:
    """Return the SQL condition, for a query of `Run`, that selects runs whose win waits for approval."""
    return text(AWAITS_APPROVAL)


def on_trial_except(run_id: int | None) -> "SelectOfScalar[int]":
    """Return a query for the ids of all drops on trial, except the drop that the run `run_id`, if given, tests."""
    other_run = col(Suspect.trial_run).is_(None) | (col(Suspect.trial_run) != (run_id or 0))
    return select(Suspect.drop_id).where(col(Suspect.ended).is_(None), other_run)


def promotion_of(session: Session, run_id: int) -> Promotion | None:
    """Return the promotion of a run's candidate for its win; `None` if it was not promoted, or only by force."""
    won = select(Promotion).where(Promotion.run_id == run_id, Promotion.kind == PromotionKind.PROMOTION)
    return session.exec(won).first()
