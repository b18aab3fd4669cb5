"""
Commands beside a daemon that works: `watch`, `wait`, `ask`, and a person's word on the queue, `search` among them.

In: `daemon.views.live`, `daemon.queue.scheduling`. Out: a screen or lines, an exit code. Open `watch` first; `screen`
draws what it shows.
"""
