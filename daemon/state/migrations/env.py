"""Run by Alembic: apply the steps on the connection, and in the transaction, of `daemon.state.database.migrate`."""

from alembic import context
from sqlmodel import SQLModel

import daemon.state.tables  # noqa: F401 - fills the metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=SQLModel.metadata,
    render_as_batch=True,
)
context.run_migrations()
