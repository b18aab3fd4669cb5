"""
The operating system: processes, signals, systemd and the clock.

No module here uses drops, runs or models, or another area of the daemon. Open the one that you need.
"""
