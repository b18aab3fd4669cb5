"""The first schema: that of `daemon.state.tables`, which a new database is made from."""

revision = "0001"
down_revision = None
