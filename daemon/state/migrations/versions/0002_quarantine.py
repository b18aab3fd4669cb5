"""Runs that are quarantined, kinds of promotions, rows set aside, nightly tracks, indexes for long histories."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_COLUMNS = (
    "id, track, state, trigger, created_at, not_before, token, heartbeat_at, started_at, ended_at, config, snapshot, "
    "failures, deaths, cancel_requested, step, error, hint, outcome, sentence"
)


def upgrade() -> None:
    """Build `run` anew, since SQLite cannot change a CHECK; give `drop` and `track` a column, and add indexes."""
    _create_runs("run_new")
    op.execute(f"INSERT INTO run_new ({_COLUMNS}) SELECT {_COLUMNS} FROM run")  # noqa: S608 - our own constant
    op.drop_table("run")
    op.rename_table("run_new", "run")
    op.create_index("ix_run_track", "run", ["track"])
    op.create_index("one_open_run", "run", ["track"], unique=True, sqlite_where=sa.text("state = 'queued'"))
    op.create_index("ix_run_state", "run", ["state"])
    op.add_column("drop", sa.Column("quarantined", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("track", sa.Column("nightly", sa.JSON(), nullable=True))
    op.execute(_NIGHTLY)
    _index_drops()
    _add_kinds()


#: A track that took slots goes on from its last one.
_NIGHTLY = """
UPDATE track SET nightly = (
  SELECT json_object('schedule', NULL, 'since', max(due_at), 'looked_at', max(taken_at))
  FROM slot WHERE slot.track = track.name
) WHERE EXISTS (SELECT 1 FROM slot WHERE slot.track = track.name)
"""


def _add_kinds() -> None:
    # By hand: SQLite takes a CHECK with a new column, Alembic has no words for it.
    kinds = "'base', 'promotion', 'rollback'"
    op.execute(
        "ALTER TABLE promotion ADD COLUMN kind VARCHAR DEFAULT 'promotion' NOT NULL "
        f"CONSTRAINT kind_known CHECK (kind IN ({kinds}))"
    )
    op.execute("UPDATE promotion SET kind = 'base' WHERE run_id IS NULL")


def _index_drops() -> None:
    op.drop_index("ix_drop_track", "drop")
    op.create_index("drop_states", "drop", ["track", "state"])
    op.create_index("drop_names", "drop", ["track", "role", "name_bytes"])
    op.create_index("drop_waiting", "drop", ["track", "role", "state"], sqlite_where=sa.text("first_run IS NULL"))
    op.create_index("ix_drop_duplicate_of", "drop", ["duplicate_of"])
    op.create_index("ix_drop_first_run", "drop", ["first_run"])


def _create_runs(name: str) -> None:
    states = "'queued', 'running', 'waiting', 'succeeded', 'failed', 'cancelled', 'crashed'"
    final = "'succeeded', 'failed', 'cancelled', 'crashed'"
    op.create_table(
        name,
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("track", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("trigger", sa.String(), nullable=False),
        sa.Column("created_at", sa.Integer(), nullable=False),
        sa.Column("not_before", sa.Integer(), nullable=False),
        sa.Column("token", sa.String()),
        sa.Column("heartbeat_at", sa.Integer()),
        sa.Column("started_at", sa.Integer()),
        sa.Column("ended_at", sa.Integer()),
        sa.Column("config", sa.JSON()),
        sa.Column("snapshot", sa.JSON()),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("deaths", sa.Integer(), nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("step", sa.String()),
        sa.Column("error", sa.String()),
        sa.Column("hint", sa.String()),
        sa.Column("outcome", sa.String()),
        sa.Column("sentence", sa.String()),
        sa.CheckConstraint(f"state IN ({states})", name="state_known"),
        sa.CheckConstraint("(state = 'running') = (token IS NOT NULL)", name="running_has_token"),
        sa.CheckConstraint(f"(state IN ({final})) = (ended_at IS NOT NULL)", name="final_has_end"),
        sa.PrimaryKeyConstraint("id"),
    )
