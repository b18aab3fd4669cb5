"""Forced promotions, approvals, what became of hooks; the held-out set of a run, the noise floor of a track."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_COLUMNS = (
    "id, track, run_id, kind, state, generation, model_id, model_path, previous_model_id, previous_path, reason, "
    "created_at, done_at"
)


def upgrade() -> None:
    """Build `promotion` anew, since SQLite cannot change a CHECK; give `run` and `track` a column."""
    _create_promotions("promotion_new")
    op.execute(f"INSERT INTO promotion_new ({_COLUMNS}) SELECT {_COLUMNS} FROM promotion")  # noqa: S608 - our own constant
    op.drop_table("promotion")
    op.rename_table("promotion_new", "promotion")
    done = "state = 'done'"
    op.create_index("ix_promotion_track", "promotion", ["track"])
    op.create_index(
        "one_promotion_a_run", "promotion", ["run_id"], unique=True,
        sqlite_where=sa.text(f"{done} AND kind = 'promotion' AND run_id IS NOT NULL"),
    )  # fmt: skip
    op.create_index(
        "one_done_generation", "promotion", ["track", "generation"], unique=True, sqlite_where=sa.text(done)
    )
    op.add_column("run", sa.Column("heldout_version", sa.String(), nullable=True))
    op.create_index("run_awaiting", "run", ["outcome"], sqlite_where=sa.text("outcome = 'awaiting_approval'"))
    op.add_column("track", sa.Column("noise", sa.JSON(), nullable=True))


def _create_promotions(name: str) -> None:
    states = "'pending', 'running', 'ok', 'failed', 'skipped'"
    op.create_table(
        name,
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("track", sa.String(), nullable=False),
        sa.Column("run_id", sa.Integer()),
        sa.Column("kind", sa.String(), nullable=False, server_default="promotion"),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("model_path", sa.String(), nullable=False),
        sa.Column("previous_model_id", sa.String()),
        sa.Column("previous_path", sa.String()),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("created_at", sa.Integer(), nullable=False),
        sa.Column("done_at", sa.Integer()),
        sa.Column("approved_by", sa.String()),
        sa.Column("overrode", sa.String()),
        sa.Column("drops", sa.JSON()),
        sa.Column("hook_state", sa.String()),
        sa.Column("hook_error", sa.String()),
        sa.Column("hook_output", sa.String()),
        sa.Column("health_state", sa.String()),
        sa.Column("health_error", sa.String()),
        sa.Column("health_output", sa.String()),
        sa.CheckConstraint("state IN ('intent', 'done', 'abandoned')", name="state_known"),
        sa.CheckConstraint("kind IN ('base', 'promotion', 'forced', 'rollback')", name="kind_known"),
        sa.CheckConstraint(f"hook_state IN ({states})", name="hook_state_known"),
        sa.CheckConstraint(f"health_state IN ({states})", name="health_state_known"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
