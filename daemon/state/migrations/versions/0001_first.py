"""The first schema: that of `daemon.state.tables`, from which a new database is created without migrations."""

revision = "0001"
down_revision = None
