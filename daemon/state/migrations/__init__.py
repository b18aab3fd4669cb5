"""Migrations of the database's schema, run by `daemon.state.database.migrate` only."""
