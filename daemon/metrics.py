"""
Metrics in Prometheus' text format, for `/metrics` of the web page and `dropforge metrics`.

They are computed at each scrape from `daemon.views` and the database, and no counter is kept: so they are the same
after a restart, while the daemon is down, and from every process. Labels name tracks, steps and states, never files or
rows. The dashboard and the alerts of `systemd/monitoring/` use these names.
"""

from collections.abc import Iterable, Iterator
from importlib.metadata import version

from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from daemon.settings.model import Settings
from daemon.state.states import DropState, MessageState, RunState
from daemon.storage.disk import Disk
from daemon.views.overview import Overview

#: The format that Prometheus' servers request and node_exporter's textfile collector reads.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_RUNS = "SELECT track, state, count(*) AS number FROM run GROUP BY track, state"
_VERDICTS = "SELECT track, outcome, count(*) AS number FROM run WHERE outcome IS NOT NULL GROUP BY track, outcome"
# The gain is that of the row with the largest id: SQLite takes a bare column from there.
_LATEST = (
    "SELECT track, json_extract(verdict, '$.gain') AS gain, max(id) FROM run WHERE outcome IS NOT NULL GROUP BY track"
)
_STEPS = (
    "SELECT r.track, a.step, count(*) AS number, sum(a.ended_at - a.started_at) AS ms "
    "FROM attempt a JOIN run r ON r.id = a.run_id WHERE a.state = 'published' GROUP BY r.track, a.step"
)
_MESSAGES = "SELECT state, count(*) AS number FROM message GROUP BY state"
_TRACK = ("track",)
Value = tuple[tuple[str, ...], float]


def metrics_text(settings: Settings) -> bytes:
    """Return a workspace's metrics, computed now, as UTF-8. Raises `DropforgeError` if its state cannot be read."""
    return generate_latest(_Workspace(settings))


class _Workspace(Collector):
    """Collects the metrics of one workspace, read anew at each `collect`."""

    def __init__(self, settings: Settings) -> None:
        """Use the state folder of `settings`, which need not exist; read nothing yet."""
        self._settings = settings
        self._overview = Overview.of(settings)

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        yield from self._machine()
        yield from self._queue()
        yield from self._current()
        yield from self._verdicts()
        yield from self._champions()

    def _machine(self) -> Iterator[Metric]:
        daemon, disk = self._overview.daemon(), Disk(self._settings)
        yield _gauge("build_info", "Version of Dropforge.", ("version",), [((version("dropforge"),), 1)])
        yield _one("up", "Whether the daemon runs.", daemon.alive)
        troubles = self._overview.troubles() if daemon.alive else {}
        yield _one("troubles", "Troubles that `dropforge status` shows: tracks, hooks, addresses.", len(troubles))
        yield _one("disk_free_bytes", "Free bytes on the fuller of the state and work disks.", disk.least_free_bytes())
        yield _one(
            "disk_low_water_bytes", "Free bytes below which no run begins (disk.low_water_bytes).", disk.low_water_bytes
        )

    def _queue(self) -> Iterator[Metric]:
        tracks, runs = self._overview.tracks(), self._overview.rows(_RUNS)
        numbers = {(row.track, row.state): row.number for row in runs}
        by_state = [((track, str(state)), numbers.get((track, state), 0)) for track in tracks for state in RunState]
        yield _gauge("runs", "Runs by state; queued, waiting and running are open.", ("track", "state"), by_state)
        paused = {pause.track for pause in self._overview.paused()}
        waits = [((track,), track in paused) for track in tracks]
        yield _gauge("track_paused", "Whether the track is paused.", _TRACK, waits)
        drops = self._overview.drop_counts()
        in_state = [
            ((track, str(state)), drops.get(track, {}).get(state, 0))
            for track in tracks
            for state in (*DropState, "on trial")
        ]
        yield _gauge("drops", "Drops by state.", ("track", "state"), in_state)
        messages = {row.state: row.number for row in self._overview.rows(_MESSAGES)}
        waiting = [((str(state),), messages.get(state, 0)) for state in MessageState]
        yield _gauge("messages", "Messages by state.", ("state",), waiting)

    def _current(self) -> Iterator[Metric]:
        running = self._overview.runs(states=[RunState.RUNNING])
        stage = [((run.track, run.step or "beginning"), 1) for run in running]
        yield _gauge("run_stage", "Step of the running run.", ("track", "step"), stage)
        steps = [(run.track, run.progress) for run in running if run.progress is not None]
        ratio = [((track,), step.done / step.total) for track, step in steps if step.total]
        yield _gauge("run_progress_ratio", "Progress of its step, from 0 to 1.", _TRACK, ratio)
        for name, field, words in (
            ("run_loss", "loss", "Training loss, in nats per token."),
            ("run_dev_loss", "dev_loss", "Loss on the dev records, in nats per token."),
            ("run_tokens_per_second", "tokens_per_second", "Tokens per second."),
            ("run_eta_seconds", "eta_seconds", "Estimated time until the step ends."),
            ("run_memory_bytes", "memory", "Memory that the step is estimated to need."),
        ):
            known = [((track,), getattr(step, field)) for track, step in steps if getattr(step, field) is not None]
            yield _gauge(name, words, _TRACK, known)
        durations = SummaryMetricFamily(
            "dropforge_step_seconds", "Duration of published steps.", labels=("track", "step")
        )
        for row in self._overview.rows(_STEPS):
            durations.add_metric((row.track, row.step), row.number, row.ms / 1000)
        yield durations

    def _verdicts(self) -> Iterator[Metric]:
        verdicts = [((row.track, row.outcome), row.number) for row in self._overview.rows(_VERDICTS)]
        # No counter: the number falls when a judged run is cancelled or an older backup is restored.
        yield _gauge("verdicts", "Runs that ended with a verdict, by its outcome.", ("track", "outcome"), verdicts)
        gains = [((row.track,), row.gain) for row in self._overview.rows(_LATEST) if row.gain is not None]
        yield _gauge("last_gain_points", "Gain of the last verdict's candidate, in points.", _TRACK, gains)

    def _champions(self) -> Iterator[Metric]:
        views = self._overview.champions(self._overview.tracks())
        generations = [((view.track,), view.generation) for view in views]
        yield _gauge("champion_generation", "Generation of the champion; 0 is the base.", _TRACK, generations)
        since = [((view.track,), view.since.timestamp()) for view in views if view.since is not None]
        yield _gauge("champion_since_timestamp_seconds", "When the champion began to serve.", _TRACK, since)
        failed = [
            ((view.track,), any(c is not None and c.state == "failed" for c in (view.hook, view.health)))
            for view in views
        ]
        yield _gauge("champion_command_failed", "Whether its hook or health command failed.", _TRACK, failed)


def _gauge(name: str, words: str, labels: tuple[str, ...], values: Iterable[Value]) -> Metric:
    made = GaugeMetricFamily(f"dropforge_{name}", words, labels=labels)
    for label, value in values:
        made.add_metric(label, value)
    return made


def _one(name: str, words: str, value: float) -> Metric:
    return _gauge(name, words, (), [((), value)])
