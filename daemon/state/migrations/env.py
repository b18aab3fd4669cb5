"""Run by Alembic: apply the steps on the connection, and in the transaction, of `daemon.state.database.migrate`."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
