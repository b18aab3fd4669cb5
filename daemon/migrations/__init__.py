"""The database's schema, step by step; run by `daemon.database.migrate`, and by nothing else."""
