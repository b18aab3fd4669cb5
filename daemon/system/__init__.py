"""The operating system: processes, signals, systemd, leases, logs and the clock. Knows nothing of the product."""
