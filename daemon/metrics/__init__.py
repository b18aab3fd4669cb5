"""
Metrics in Prometheus' text format, for `/metrics` of the web page and `dropforge metrics`.

In: data from `daemon.views`. Out: a text. Labels name tracks, steps and states, never files or rows. The dashboard and
the alerts of `systemd/monitoring/` use these names. Open `exposition` first.
"""
