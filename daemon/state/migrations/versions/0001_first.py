"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create every table; a table after those that it refers to."""
    _create_events()
    _create_tracks()
    _create_runs()
    _create_attempts()
    _create_drops()
    _create_suspects()
    _create_promotions()
    _create_slots()


def _integer(name: str, *, null: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.Integer(), nullable=null)


def _text(name: str, *, null: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(), nullable=null)


def _json(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.JSON(), nullable=True)


def _create_events() -> None:
    op.create_table(
        "event",
        _integer("id"),
        _integer("at"),
        _text("kind"),
        _text("track", null=True),
        _integer("run_id", null=True),
        _integer("drop_id", null=True),
        _json("detail"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_event_at", "event", ["at"])
    op.create_index("ix_event_drop_id", "event", ["drop_id"])
    op.create_index("ix_event_run_id", "event", ["run_id"])
    changed = sa.text("kind = 'yardstick_changed'")
    op.create_index("yardstick_events", "event", ["track"], sqlite_where=changed)


def _create_tracks() -> None:
    op.create_table(
        "track",
        _text("name"),
        _text("salt"),
        _integer("created_at"),
        _json("split"),
        _text("metric", null=True),
        _integer("max_new_tokens", null=True),
        _integer("eval_batch_size", null=True),
        _text("base_path", null=True),
        _text("base_model_id", null=True),
        _integer("champion_generation", null=True),
        _text("champion_model_id", null=True),
        _text("champion_path", null=True),
        _json("nightly"),
        _json("noise"),
        _json("paused"),
        sa.PrimaryKeyConstraint("name"),
    )


def _create_runs() -> None:
    final = "'succeeded', 'failed', 'cancelled', 'crashed'"
    states = f"'queued', 'running', 'waiting', {final}"
    op.create_table(
        "run",
        _integer("id"),
        _text("track"),
        _text("state"),
        _text("trigger"),
        _integer("created_at"),
        _integer("not_before"),
        sa.Column("place", sa.Integer(), nullable=False, server_default="0"),
        _text("token", null=True),
        _integer("heartbeat_at", null=True),
        _integer("started_at", null=True),
        _integer("ended_at", null=True),
        _json("config"),
        _json("snapshot"),
        _integer("failures"),
        _integer("deaths"),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        _text("step", null=True),
        _text("error", null=True),
        _text("hint", null=True),
        _text("outcome", null=True),
        _text("sentence", null=True),
        sa.Column("gain", sa.Float(), nullable=True),
        _text("heldout_version", null=True),
        sa.CheckConstraint(f"state IN ({states})", name="state_known"),
        sa.CheckConstraint("(state = 'running') = (token IS NOT NULL)", name="running_has_token"),
        sa.CheckConstraint(f"(state IN ({final})) = (ended_at IS NOT NULL)", name="final_has_end"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_run_track", "run", ["track"])
    op.create_index("ix_run_state", "run", ["state"])
    op.create_index("one_open_run", "run", ["track"], unique=True, sqlite_where=sa.text("state = 'queued'"))
    op.create_index("run_awaiting", "run", ["outcome"], sqlite_where=sa.text("outcome = 'awaiting_approval'"))


def _create_attempts() -> None:
    states = "'submitted', 'published', 'failed', 'interrupted', 'lost'"
    op.create_table(
        "attempt",
        _integer("id"),
        _integer("run_id"),
        _text("step"),
        _integer("number"),
        _text("fence"),
        _text("state"),
        _integer("started_at"),
        _integer("ended_at", null=True),
        _text("error", null=True),
        sa.CheckConstraint(f"state IN ({states})", name="state_known"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_attempt_run_id", "attempt", ["run_id"])
    op.create_index("one_attempt_number", "attempt", ["run_id", "step", "number"], unique=True)
    op.create_index("one_open_attempt", "attempt", ["run_id"], unique=True, sqlite_where=sa.text("state = 'submitted'"))


def _create_drops() -> None:
    states = "'accepted', 'proposed', 'rejected', 'duplicate', 'withdrawn', 'suspended'"
    op.create_table(
        "drop",
        _integer("id"),
        _text("track"),
        _text("role"),
        _text("state"),
        sa.Column("name_bytes", sa.LargeBinary(), nullable=False),
        _text("name"),
        _text("sha256"),
        _integer("size_bytes"),
        _integer("rows"),
        _integer("findings"),
        _integer("warnings"),
        sa.Column("quarantined", sa.Integer(), nullable=False, server_default="0"),
        _integer("duplicate_of", null=True),
        _text("reason", null=True),
        _integer("received_at"),
        _integer("first_run", null=True),
        sa.CheckConstraint(f"state IN ({states})", name="state_known"),
        sa.CheckConstraint("role IN ('train', 'heldout')", name="role_known"),
        sa.ForeignKeyConstraint(["duplicate_of"], ["drop.id"]),
        sa.ForeignKeyConstraint(["first_run"], ["run.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_drop_sha256", "drop", ["sha256"])
    op.create_index("ix_drop_duplicate_of", "drop", ["duplicate_of"])
    op.create_index("ix_drop_first_run", "drop", ["first_run"])
    op.create_index("drop_states", "drop", ["track", "state"])
    op.create_index("drop_names", "drop", ["track", "role", "name_bytes"])
    op.create_index("drop_waiting", "drop", ["track", "role", "state"], sqlite_where=sa.text("first_run IS NULL"))
    accepted = sa.text("state = 'accepted'")
    op.create_index("one_accepted_drop", "drop", ["track", "role", "sha256"], unique=True, sqlite_where=accepted)


def _create_suspects() -> None:
    open_ = "ended IS NULL"
    op.create_table(
        "suspect",
        _integer("id"),
        _text("track"),
        _integer("drop_id"),
        _integer("blamed_run"),
        _integer("trial_run", null=True),
        _integer("opened_at"),
        _text("ended", null=True),
        _integer("ended_at", null=True),
        sa.CheckConstraint("ended IN ('cleared', 'suspended', 'ended')", name="ended_known"),
        sa.CheckConstraint("(ended IS NULL) = (ended_at IS NULL)", name="ended_has_time"),
        sa.ForeignKeyConstraint(["drop_id"], ["drop.id"]),
        sa.ForeignKeyConstraint(["blamed_run"], ["run.id"]),
        sa.ForeignKeyConstraint(["trial_run"], ["run.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_suspect_trial_run", "suspect", ["trial_run"])
    op.create_index("one_open_suspect", "suspect", ["drop_id"], unique=True, sqlite_where=sa.text(open_))
    trial = sa.text(f"{open_} AND trial_run IS NOT NULL")
    op.create_index("one_trial", "suspect", ["track"], unique=True, sqlite_where=trial)


def _create_promotions() -> None:
    hook_states = "'pending', 'running', 'ok', 'failed', 'skipped'"
    op.create_table(
        "promotion",
        _integer("id"),
        _text("track"),
        _integer("run_id", null=True),
        sa.Column("kind", sa.String(), nullable=False, server_default="promotion"),
        _text("state"),
        _integer("generation"),
        _text("model_id"),
        _text("model_path"),
        _text("previous_model_id", null=True),
        _text("previous_path", null=True),
        _text("reason"),
        _integer("created_at"),
        _integer("done_at", null=True),
        _text("approved_by", null=True),
        _text("overrode", null=True),
        _json("drops"),
        _text("hook_state", null=True),
        _text("hook_error", null=True),
        _text("hook_output", null=True),
        _text("health_state", null=True),
        _text("health_error", null=True),
        _text("health_output", null=True),
        sa.CheckConstraint("state IN ('intent', 'done', 'abandoned')", name="state_known"),
        sa.CheckConstraint("kind IN ('base', 'promotion', 'forced', 'rollback')", name="kind_known"),
        sa.CheckConstraint(f"hook_state IN ({hook_states})", name="hook_state_known"),
        sa.CheckConstraint(f"health_state IN ({hook_states})", name="health_state_known"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    done = sa.text("state = 'done'")
    won = sa.text("state = 'done' AND kind = 'promotion' AND run_id IS NOT NULL")
    op.create_index("ix_promotion_track", "promotion", ["track"])
    op.create_index("promotion_models", "promotion", ["track", "model_id"])
    op.create_index("one_done_generation", "promotion", ["track", "generation"], unique=True, sqlite_where=done)
    op.create_index("one_promotion_a_run", "promotion", ["run_id"], unique=True, sqlite_where=won)


def _create_slots() -> None:
    op.create_table(
        "slot",
        _integer("id"),
        _text("track"),
        _integer("due_at"),
        _integer("taken_at"),
        _text("outcome"),
        _integer("run_id", null=True),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("one_slot_a_night", "slot", ["track", "due_at"], unique=True)
