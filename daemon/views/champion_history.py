"""A track's champions: since when, until when, why, by whom, trained on which drops, in what time."""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from sqlite3 import Connection
from types import SimpleNamespace
from typing import Any

from daemon.champions.history import former
from daemon.state.clauses import change_clauses, drop_clauses, verdict_clauses
from daemon.state.questions import CHAMPIONS, WATCHED
from daemon.state.run_files import readable_dataset
from daemon.state.states import DropState
from daemon.views.reader import Reader, Time
from pipeline.artifacts import Frozen
from pipeline.data_words import start_words
from pipeline.decide.explain import sentence
from pipeline.decide.watch import Watch, watch_of

#: More than any generation.
_BEYOND = 1 << 62
#: Champions with their tracks, and the runs that made their models.
_CHAMPIONS = """
SELECT champion.*, run.id, run.outcome, run.verdict AS judged,
    (SELECT sum(ended_at - started_at) / 1000.0 FROM attempt WHERE run_id = champion.run) AS seconds,
    (SELECT created_at FROM promotion WHERE track = champion.track AND generation > champion.generation
        ORDER BY generation LIMIT 1) AS until
FROM (
    SELECT track, generation, model_id, kind, reason, restored, verdict, approved_by, overrode, drops, run_id AS run,
        promotion.created_at AS since, hook_state, hook_error, hook_output, health_state, health_error, health_output,
        iif(base_path <> '' AND base_model_id = model_id, base_path, model_path) AS path
    FROM promotion JOIN track ON track.name = promotion.track WHERE {}
) AS champion LEFT JOIN run ON run.id = champion.run
"""
#: The track of a drop that may be trained on.
_TRACK_OF = "SELECT t.* FROM track t JOIN \"drop\" d ON d.track = t.name WHERE d.id = ? AND d.role = 'train'"


class TrainedOn(Frozen):
    """A drop in the snapshot that a champion was made from."""

    id: int
    name: str
    sha256: str
    role: str
    rows: int
    state: str
    """Current state of the drop: accepted, withdrawn or suspended."""
    reason: str | None

    @property
    def taken_out(self) -> bool:
        """Whether it was withdrawn or suspended, so that later runs do not use it."""
        return self.state in {DropState.WITHDRAWN, DropState.SUSPENDED}

    @property
    def since_words(self) -> str:
        """Its state and the reason, as "withdrawn since: REASON"; empty if not withdrawn or suspended."""
        return f"{self.state} since{f': {self.reason}' if self.reason else ''}" if self.taken_out else ""


class CommandView(Frozen):
    """The state and output of a hook command after a change of champion."""

    state: str
    """pending, running, ok, failed or skipped."""
    error: str | None
    output: str | None
    """The end of what it printed."""


class ServingView(Frozen):
    """A track's current or a former champion, without its data."""

    track: str
    generation: int
    """0 is the base model."""
    model_id: str
    path: str
    """Absolute path of the model's folder."""
    since: Time | None
    until: Time | None
    """When another champion took its place; `None` while it serves."""
    kind: str
    """How it became the champion: base, promotion, forced or rollback."""
    run: int | None
    """Id of the run that trained it; `None` for a base model."""
    reason: str
    approved_by: str | None
    """Who approved, forced or rolled back; `None` if the daemon did."""
    overrode: str | None
    """Outcome of the run whose model was forced."""
    verdict: str | None
    """Sentence of the verdict of `run`."""
    gain: float | None
    """Gain over the champion that `run` compared it with, in points of the primary metric."""
    hook: CommandView | None
    health: CommandView | None
    watch: Watch | None = None
    """Of the champion that serves."""
    seconds: float | None = None
    """Time that the steps of the run that made it took; `None` for a base model."""


class ChampionView(ServingView):
    """A track's current or a former champion, with its data."""

    drops: tuple[str, ...]
    """Names of the files that it was trained on."""
    data: tuple[TrainedOn, ...]
    """The same files and the held-out ones, with what has become of them."""
    training: str | None = None
    """What `run` trained from, the base or a champion, on how many rows; `None` if its data is gone."""
    over: int | None = None
    """Generation of the champion that it trained from; `None` for the base, or if its data is gone."""

    @property
    def taken_out(self) -> tuple[TrainedOn, ...]:
        """The drops that it was trained on and that were withdrawn or suspended since."""
        return tuple(drop for drop in self.data if drop.role == "train" and drop.taken_out)


class DropUses(Frozen):
    """The serving champion if it was trained on a given drop, and the champion to roll back to."""

    champion: int | None = None
    """Generation of the serving champion, if that was trained on it."""
    before: int | None = None
    """The latest generation that may serve again and was trained neither on it nor on a withdrawn drop."""


class Champions(Reader):
    """Reads the champions of a workspace's tracks."""

    def champions(self, tracks: Iterable[str]) -> list[ServingView]:
        """Return the champions of `tracks`, in that order, without their data; a track without any is left out."""
        views = self.each(
            lambda reader, row: ServingView.model_validate(self._champion_fields(reader, row), extra="ignore"),
            _CHAMPIONS.format("generation = champion_generation"),
        )
        champions = {view.track: view for view in views}
        return [champions[name] for name in tracks if name in champions]

    def champion(self, track: str) -> ChampionView | None:
        """Return the track's champion; `None` if it has none, not even its base model."""
        return next(iter(self.history(track, 1)), None)

    def history(self, track: str, most: int = -1, before: int | None = None) -> list[ChampionView]:
        """Return current and former champions, newest first: at most `most` (-1: all), generations below `before`."""
        which = _CHAMPIONS.format("track = ? AND generation < ? ORDER BY generation DESC LIMIT ?")
        values = (track, _BEYOND if before is None else before, most)
        return self.each(self._with_data, f"{which} ORDER BY generation DESC", values)

    def uses(self, drop_id: int) -> DropUses:
        """Return the serving generation if trained on this drop, and that to roll back to, if any; else two `None`."""
        for track in self.rows(_TRACK_OF, drop_id):
            past = self.rows(CHAMPIONS, track=track.name)
            if past and drop_id in (past[-1].drops or ()):
                earlier = former(past, track, self.folder)
                without = self.rows("""SELECT id FROM "drop" WHERE track = ? AND state = 'withdrawn'""", track.name)
                gone = {drop_id, *(row.id for row in without)}
                before = next((model.generation for model in earlier if gone.isdisjoint(model.drops or ())), None)
                return DropUses(champion=track.champion_generation, before=before)
        return DropUses()

    def _with_data(self, reader: Connection, row: Any) -> ChampionView:
        data = trained_on(reader, row.drops or ())
        prepared = None if row.run is None else readable_dataset(self.folder, row.run)
        fields = {
            **self._champion_fields(reader, row),
            "drops": tuple(drop.name for drop in data if drop.role == "train"),
            "data": data,
            "training": None if prepared is None else start_words(prepared),
            "over": None if prepared is None or prepared.start is None else prepared.start.generation,
        }
        return ChampionView.model_validate(fields, extra="ignore")

    def _champion_fields(self, reader: Connection, row: Any) -> dict[str, object]:
        """Return the fields of a `ServingView` from a row of `_CHAMPIONS`, with the row's other columns."""
        run, hooks = SimpleNamespace(id=row.run, outcome=row.outcome, verdict=row.judged), self._hooks.get(row.track)
        return {
            **vars(row),
            "path": str(self.folder / row.path),
            "reason": sentence(change_clauses(row)),
            "verdict": sentence(verdict_clauses(run)) or None,
            "gain": (row.judged or {}).get("gain"),
            "watch": None if row.until else watch_of(reader.execute(WATCHED, {"track": row.track}).fetchall()),
            "hook": _command(row.hook_state, row.hook_error, row.hook_output, hooks and hooks.after_promotion),
            "health": _command(row.health_state, row.health_error, row.health_output, hooks and hooks.health),
        }


def serving_at(history: Sequence[ChampionView], at: datetime) -> ChampionView | None:
    """Return the champion that served at `at`, which has a time zone; `None` if none. `history` is newest first."""
    return next((champion for champion in history if champion.since is not None and champion.since <= at), None)


def trained_on(reader: Connection, ids: Iterable[int]) -> tuple[TrainedOn, ...]:
    """Return the drops with these ids, in their order of arrival, as they are now; unknown ids are left out."""
    wanted = 'SELECT * FROM "drop" WHERE id IN (SELECT value FROM json_each(?)) ORDER BY id'
    rows = reader.execute(wanted, (json.dumps(list(ids)),)).fetchall()
    fields = ({**vars(row), "reason": next(iter(drop_clauses(row)), None)} for row in rows)
    return tuple(TrainedOn.model_validate(row, extra="ignore") for row in fields)


def _command(state: str | None, error: str | None, output: str | None, argv: object) -> CommandView | None:
    """Return a hook's view; `None` without a `state`, or if it is pending and the settings have no command `argv`."""
    if state is None or (state == "pending" and not argv):
        return None
    return CommandView(state=state, error=error, output=output)
