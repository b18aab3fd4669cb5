"""Run by Alembic: apply the migrations in the connection and transaction of `daemon.state.database.migrate`."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
