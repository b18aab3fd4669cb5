"""
What a monitoring system watches, in Prometheus' text format: for `/metrics` of the page and `dropforge metrics`.

In: what `daemon.views` answers, and the graphics cards. Out: a text. Labels name tracks, steps, states and cards, never
files or rows. The dashboard and the alerts of `systemd/monitoring/` stand on these names. Open `exposition` first.
"""
