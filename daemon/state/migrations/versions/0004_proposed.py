"""Held-out files that wait for a person's word."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_COLUMNS = (
    "id, track, role, state, name_bytes, name, sha256, size_bytes, rows, findings, warnings, quarantined, "
    "duplicate_of, reason, received_at, first_run"
)


def upgrade() -> None:
    """Build `drop` anew, since SQLite cannot change a CHECK."""
    _create_drops("drop_new")
    op.execute(f'INSERT INTO drop_new ({_COLUMNS}) SELECT {_COLUMNS} FROM "drop"')  # noqa: S608 - our own constant
    op.drop_table("drop")
    op.rename_table("drop_new", "drop")
    op.create_index("ix_drop_sha256", "drop", ["sha256"])
    accepted = sa.text("state = 'accepted'")
    op.create_index("one_accepted_drop", "drop", ["track", "role", "sha256"], unique=True, sqlite_where=accepted)
    op.create_index("drop_states", "drop", ["track", "state"])
    op.create_index("drop_names", "drop", ["track", "role", "name_bytes"])
    op.create_index("drop_waiting", "drop", ["track", "role", "state"], sqlite_where=sa.text("first_run IS NULL"))
    op.create_index("ix_drop_duplicate_of", "drop", ["duplicate_of"])
    op.create_index("ix_drop_first_run", "drop", ["first_run"])


def _create_drops(name: str) -> None:
    states = "'accepted', 'proposed', 'rejected', 'duplicate', 'withdrawn', 'suspended'"
    op.create_table(
        name,
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("track", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("name_bytes", sa.LargeBinary(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("size_bytes", sa.Integer(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("findings", sa.Integer(), nullable=False),
        sa.Column("warnings", sa.Integer(), nullable=False),
        sa.Column("quarantined", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("duplicate_of", sa.Integer()),
        sa.Column("reason", sa.String()),
        sa.Column("received_at", sa.Integer(), nullable=False),
        sa.Column("first_run", sa.Integer()),
        sa.CheckConstraint(f"state IN ({states})", name="state_known"),
        sa.CheckConstraint("role IN ('train', 'heldout')", name="role_known"),
        sa.ForeignKeyConstraint(["duplicate_of"], [f"{name}.id"]),
        sa.ForeignKeyConstraint(["first_run"], ["run.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
