"""
Metrics in Prometheus' text format, for `/metrics` of the web page and `dropforge metrics`.

In: data from `daemon.views`, and the graphics cards. Out: a text. Labels name tracks, steps, states and cards, never
files or rows. The dashboard and the alerts of `systemd/monitoring/` use these names. Open `exposition` first.
"""
