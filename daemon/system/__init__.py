"""
The operating system: processes, signals, systemd, logs and the clock.

It knows nothing of drops, runs or models. Each module is one thing by itself; open the one that you need.
"""
