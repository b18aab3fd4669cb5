"""The report of a run, and the comparison of two runs by their settings, drops and published scores."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from daemon.state.questions import MAKER
from daemon.state.states import state_words
from daemon.views.overview import NotThere, Overview, RunDetail
from pipeline import durable
from pipeline.artifacts import JSON_NAME, PAGE_NAME, RECORDS_NAME, Frozen
from pipeline.errors import DropforgeError
from pipeline.report.facts import Story

#: Settings that are not compared: the salt differs between tracks, the noise is measured by the track's first run.
_UNTOLD = frozenset({"salt", "noise"})
#: Setting -> (the value that leaves the choice to the run, the step and the field that publish the run's choice).
_CHOSEN: Mapping[str, tuple[object, str, str]] = {
    "evaluate.metric": ("auto", "prepare", "metric"),
    "evaluate.max_new_tokens": (0, "prepare", "max_new_tokens"),
    "evaluate.batch_size": (0, "evaluate", "batch_size"),
}


class ReportDamaged(DropforgeError):
    """A run's report.json or its scored records are missing or damaged."""


class ComparedRun(Frozen):
    """One of the two runs of a comparison."""

    run: int
    track: str
    state: str
    outcome: str | None
    sentence: str | None
    gain: float | None
    model_id: str | None
    """Of its candidate."""
    train_rows: int | None
    heldout_version: str | None
    drops: tuple[str, ...]
    """Names of its files that the other run did not have."""


class Setting(Frozen):
    """A setting whose value differs between the two runs."""

    name: str
    first: Any
    second: Any
    first_chosen: bool = False
    """Whether it was left to the run: the value is then the run's choice, `None` if it has not come to it."""
    second_chosen: bool = False


class Score(Frozen):
    """One metric of both candidates, in points: means over the records that both were scored on."""

    metric: str
    first: float
    second: float


class Comparison(Frozen):
    """Two runs compared: their drops, settings and scores."""

    first: ComparedRun
    second: ComparedRun
    settings: tuple[Setting, ...]
    records: int = 0
    """Scored in both runs, with the same references."""
    references_changed: int = 0
    """Scored in both with other references: their scores say different things and are left out."""
    scores: tuple[Score, ...] = ()
    metric: str | None = None
    """The one that wins and losses are counted by: the second run's."""
    wins: int = 0
    """Records that the second run's candidate answered better."""
    losses: int = 0
    ties: int = 0
    not_compared: str | None = None
    """Why there are no scores."""


def report_folder(overview: Overview, run_id: int) -> Path:
    """Return the folder of a run's report.html and report.json. Raises `NotThere` with the reason if it has none."""
    run = overview.run(run_id)
    if run.verdict is None:
        why = f": it {state_words(run.state)}{f': {run.error}' if run.error else ''}" if run.ended_at else ""
        raise NotThere(
            f"run {run_id} has no verdict, so there is no report{why}",
            (why and run.hint) or f"see how far it is: dropforge show {run_id}",
        )
    folder = overview.folder / run.verdict.report if run.verdict.report else None
    if folder is None or not (folder / PAGE_NAME).is_file():
        raise NotThere(
            f"the report of run {run_id} is not there{f': {folder} is gone' if folder else ''}",
            f"the verdict and its numbers: dropforge show {run_id}",
        )
    return folder


def report_data(overview: Overview, run_id: int) -> dict[str, Any]:
    """Return the content of a run's report.json. Raises `NotThere` or `ReportDamaged`."""
    path = report_folder(overview, run_id) / JSON_NAME
    try:
        value = durable.read_json(path)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ReportDamaged(
            f"the data of the report of run {run_id} is damaged or gone: {path}",
            f"bring it back from a backup; the page is in the same folder: dropforge report {run_id}",
        )
    return value


def story_of(overview: Overview, run: RunDetail) -> Story | None:
    """Return the reasons for a run's verdict and the next steps, from its report; `None` without a valid report."""
    if run.verdict is None or run.verdict.report is None:
        return None
    told = durable.read_object(overview.folder / run.verdict.report / JSON_NAME).get("story")
    try:
        return Story.model_validate(told)
    except ValidationError:
        return None


def compare(overview: Overview, first_id: int, second_id: int) -> Comparison:
    """Compare two runs: their drops, settings, and scores on common records. Raises `NotThere` for an unknown run."""
    first, second = overview.run(first_id), overview.run(second_id)
    names = [{drop["sha256"]: drop["name"] for drop in run.snapshot} for run in (first, second)]
    made = Comparison(
        first=_compared(overview, first, _only(names[0], names[1])),
        second=_compared(overview, second, _only(names[1], names[0])),
        settings=tuple(differing_settings(overview, first, second)),
    )
    return made.model_copy(update=_scores(overview, first, second))


def _compared(overview: Overview, run: RunDetail, drops: tuple[str, ...]) -> ComparedRun:
    data = overview.published(run.id, "prepare") or {}
    verdict = run.verdict
    return ComparedRun(
        run=run.id,
        track=run.track,
        state=run.state,
        outcome=run.outcome,
        sentence=run.sentence,
        drops=drops,
        gain=verdict.gain if verdict else None,
        model_id=verdict.candidate_model_id if verdict else None,
        train_rows=data.get("train_rows"),
        heldout_version=(verdict.heldout_version if verdict else None) or data.get("heldout_version"),
    )


def _only(these: Mapping[str, str], others: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(name for sha256, name in these.items() if sha256 not in others)


def differing_settings(overview: Overview, first: RunDetail, second: RunDetail) -> Iterator[Setting]:
    """
    Yield the settings whose values in force differ between the two runs.

    A track's first run chooses some values itself, and later runs get its choice: the chosen values are compared.
    """
    (ours, our_choice), (theirs, their_choice) = _in_force(overview, first), _in_force(overview, second)
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            yield Setting(
                name=name,
                first=ours.get(name),
                second=theirs.get(name),
                first_chosen=name in our_choice,
                second_chosen=name in their_choice,
            )


def _in_force(overview: Overview, run: RunDetail) -> tuple[dict[str, Any], set[str]]:
    """Return a run's settings in force by their full names, and the names of those that the run chose itself."""
    told = {name: value for name, value in _flat(run.config or {}) if name.partition(".")[0] not in _UNTOLD}
    left = {name for name, (leaves_open, _, _) in _CHOSEN.items() if name in told and told[name] == leaves_open}
    chosen = {}
    for name in left:
        _, step, field = _CHOSEN[name]
        chosen[name] = (overview.published(run.id, step) or {}).get(field)
    return {**told, **chosen}, left


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, value


def _scores(overview: Overview, first: RunDetail, second: RunDetail) -> dict[str, Any]:
    """Return the score fields of a `Comparison`, or `not_compared` with the reason why there are no scores."""
    places = [_records_path(overview, run) for run in (first, second)]
    for run, path in zip((first, second), places, strict=True):
        if path is None:
            return {"not_compared": f"run {run.id} has no scored records, or they were cleared away"}
    try:
        ours, theirs = (_by_id(path) for path in places if path is not None)
    except ReportDamaged as error:
        return {"not_compared": error.message}
    ways = [_asked(overview, run) for run in (first, second)]
    other = sorted(name for name in ways[0] if ways[0][name] != ways[1][name])
    if other:
        return {"not_compared": f"the models were not prompted in the same way: {', '.join(other)}"}
    both = [record for record in ours if record in theirs]
    same = [record for record in both if ours[record].get("references") == theirs[record].get("references")]
    pairs = [(_given(ours[record]), _given(theirs[record])) for record in same]
    report = overview.published(second.id, "evaluate") or {}
    return {
        "records": len(same),
        "references_changed": len(both) - len(same),
        **_means(pairs),
        **_flips(pairs, report),
        "not_compared": None if same else "no record was scored in both runs",
    }


def _records_path(overview: Overview, run: RunDetail) -> Path | None:
    report = overview.published(run.id, "evaluate")
    path = None if report is None else overview.folder / str(report["folder"]) / RECORDS_NAME
    return path if path is not None and path.is_file() else None


def _by_id(path: Path) -> dict[str, dict[str, Any]]:
    """Return the scored records in `path` by their id. Raises `ReportDamaged`."""
    try:
        lines = {line["id"]: line for line in durable.read_jsonl(path)}
        sound = all(isinstance(score, float | int) for line in lines.values() for score in _given(line).values())
    except (ValueError, LookupError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ReportDamaged(f"the scored records in {path} are damaged")
    return lines


def _given(line: Mapping[str, Any]) -> dict[str, float]:
    scores: dict[str, float] = line["candidate"]["scores"]
    return scores


def _asked(overview: Overview, run: RunDetail) -> dict[str, Any]:
    """Return the conditions of generation besides the candidate; scores are compared only if they are equal."""
    report, data, model = (overview.published(run.id, step) or {} for step in ("evaluate", "prepare", "merge"))
    settings = (run.config or {}).get("evaluate", {})
    return {
        "batch size": report.get("batch_size"),
        "versions": report.get("versions"),
        "max_new_tokens": data.get("max_new_tokens"),
        "repetition penalty": settings.get("repetition_penalty"),
        "format": model.get("format"),
        "dtype": model.get("dtype"),
        "base model": model.get("base_model_id"),
    }


def _means(pairs: list[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    shared = sorted(set.intersection(*(set(scores) for pair in pairs for scores in pair))) if pairs else []

    def mean(place: int, name: str) -> float:
        return 100 * sum(pair[place][name] for pair in pairs) / len(pairs)

    return {"scores": tuple(Score(metric=name, first=mean(0, name), second=mean(1, name)) for name in shared)}


def _flips(pairs: list[tuple[dict[str, float], dict[str, float]]], report: Mapping[str, Any]) -> dict[str, Any]:
    metric = report.get("metric")
    if not pairs or not all(metric in scores for pair in pairs for scores in pair):
        return {}
    changes = [second[str(metric)] - first[str(metric)] for first, second in pairs]
    wins, losses = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    return {"metric": metric, "wins": wins, "losses": losses, "ties": len(changes) - wins - losses}


class Changes(Frozen):
    """Settings in which a run differs from the run that made its champion."""

    against: int
    """That run."""
    settings: tuple[Setting, ...]
    """`first` is the champion's, `second` this run's."""


def changes_since_champion(overview: Overview, run: RunDetail) -> Changes | None:
    """Compare a run's settings with the settings of the run that made its champion; `None` if either is missing."""
    made = _champions_run(overview, run)
    if run.config is None or made is None or made == run.id:
        return None
    try:
        champion = overview.run(made)
    except NotThere:
        return None
    return Changes(against=made, settings=tuple(differing_settings(overview, champion, run)))


def _champions_run(overview: Overview, run: RunDetail) -> int | None:
    """Return the id of the run that made `run`'s champion (before a verdict, today's); `None` for a base model."""
    if run.verdict is not None and run.verdict.champion_model_id is not None:
        found: int | None = overview.rows(MAKER, track=run.track, model=run.verdict.champion_model_id)[0].run
        return found
    serving = overview.champion(run.track)
    return None if serving is None else serving.run
