"""The database's schema, step by step; run by `daemon.state.database.migrate`, and by nothing else."""
