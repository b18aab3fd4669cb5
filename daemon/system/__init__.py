"""
The operating system: processes, signals, systemd, logs and the clock.

No module here uses drops, runs or models, or another area of the daemon. Open the one that you need.
"""
