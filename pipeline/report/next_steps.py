"""Suggest what the user can do after a verdict, with the commands for it."""

import math
from collections.abc import Callable, Sequence

from pipeline.artifacts import Adapter, Dataset, GuardResult, Outcome, Verdict
from pipeline.config import RunConfig, TrainConfig
from pipeline.contract import StepSpec
from pipeline.decide.explain import SETTLED
from pipeline.decide.policy import GENERAL_SHARE, GUARDS, MOST_TIMES, is_doubt, label
from pipeline.report.facts import NextStep
from pipeline.words import count, listed, plain, worth_words

_KEPT = "No drop is suspended for this: all are trained on again, together with the next ones."


def next_steps(
    verdict: Verdict, dataset: Dataset, spec: StepSpec, adapter: Adapter | None = None
) -> Sequence[NextStep]:
    """Return the suggested steps, the most useful first; `spec` is that of the decide step."""
    config, run = spec.config, spec.run
    tell_next: dict[Outcome, Callable[[], list[NextStep]]] = {
        "promoted": lambda: _after_a_win(verdict, spec),
        "worse": lambda: [*_after_forgetting(dataset, config.train, adapter), *_after_harm(verdict, spec)],
        "not_shown_better": lambda: [*_proposed(spec), *_after_no_proof(verdict, dataset, spec, adapter)],
        "insufficient_evidence": lambda: [*_proposed(spec), *_after_too_little(verdict, dataset)],
        "guard_failed": lambda: _after_guards(verdict, dataset, spec, adapter),
        "contaminated": lambda: [
            NextStep(words="Judge it on other records: drop a held-out set that no drop has rows of."),
            NextStep(words="See which drops are new in this run.", command=f"dropforge show {run}"),
            NextStep(words="Or drop a file of rows: the next run is prepared and trained anew."),
        ],
    }
    if spec.trial and verdict.outcome != "promoted":
        words = "This run is a control, without new drops: the trial before it is compared with it."
        if verdict.settlement is not None:
            words += f" {SETTLED[verdict.settlement.passed].capitalize()}."
        return [NextStep(words=words, command="dropforge drops")]
    steps = tell_next[verdict.outcome]()
    if spec.left_out is None or verdict.worth is None:
        return steps
    worth = f"worth {worth_words(*verdict.worth)}, measured on the held-out records of this run"
    about = f"This run left out drop {spec.left_out}. The drop is {worth}."
    if verdict.outcome != "promoted":
        return [NextStep(words=f"{about} The champion and all drops stay.", command="dropforge drops")]
    again = "Once the model without it serves, the drop counts as new: a run tries it again."
    return [NextStep(words=f"{about} {again}", command="dropforge drops"), *steps]


def _withdraw(spec: StepSpec) -> str:
    """Return the command that withdraws a run's new drop; DROP is in place of its number unless there is just one."""
    known = spec.champion.drops or ()
    new = [str(drop.id) for drop in spec.drops if drop.role == "train" and drop.id not in known]
    return f"dropforge drops withdraw {new[0] if len(new) == 1 else 'DROP'} --reason TEXT"


def _after_a_win(verdict: Verdict, spec: StepSpec) -> list[NextStep]:
    config, run = spec.config, spec.run
    undo = NextStep(
        words="If it disappoints in use, let the champion before it serve again.",
        command=f"dropforge rollback --track {config.track} --reason TEXT",
    )
    costs = " The answers that became worse, in the report, show what it costs." if verdict.losses else ""
    if config.gate.approval == "manual":
        blind = NextStep(
            words=f"Judge {count(config.gate.review, 'pair')} of answers blind: the promotion waits for it.",
            command=f"dropforge review {run}",
        )
        serve = NextStep(words=f"Let it serve.{costs}", command=f"dropforge promote {run}")
        return [*([blind] if config.gate.review else []), serve]
    serves = "The new model serves by itself; only one that you rolled back from before waits for you."
    return [NextStep(words=f"{serves}{costs}"), undo]


def _after_guards(verdict: Verdict, dataset: Dataset, spec: StepSpec, adapter: Adapter | None) -> list[NextStep]:
    """Return the remedies of the guards that failed, then how to find a bad drop, or that all drops are used again."""
    failed = [guard for guard in verdict.guards if guard.state == "failed"]
    forgot = any(GUARDS[guard.guard].forgets for guard in failed)
    steps = _after_forgetting(dataset, spec.config.train, adapter) if forgot else []
    for name in dict.fromkeys(guard.guard for guard in failed):
        steps += _remedies([guard for guard in failed if guard.guard == name], dataset, spec.config, adapter)
    return [*steps, *(_after_harm(verdict, spec) if verdict.blames_new_drops else [NextStep(words=_KEPT)])]


def _after_forgetting(dataset: Dataset, train: TrainConfig, adapter: Adapter | None) -> list[NextStep]:
    """Return the step against a loss that a training over the champion may have caused; none for one from the base."""
    if dataset.start is None:
        return []
    rate = f" (it was {adapter.learning_rate:g})" if adapter else ""
    words = (
        'This run went on from the champion (train.start = "champion"), which can make a model forget. Set '
        f'train.start = "base", raise train.replay (it was {train.replay:g}) or lower train.learning_rate{rate}.'
    )
    return [NextStep(words=words)]


def _remedies(
    failed: Sequence[GuardResult], dataset: Dataset, config: RunConfig, adapter: Adapter | None
) -> list[NextStep]:
    """Return the remedies of one guard with the numbers of its `failed` results and of this run."""
    guard = GUARDS[failed[0].guard]
    epochs, rate = (f" (it was {used:g})" for used in (adapter.epochs, adapter.learning_rate)) if adapter else ("", "")
    facts = {
        "fell": listed([f"{label(row)} by {plain(-(row.change or 0.0))} points" for row in failed]),
        "margin": plain(failed[0].margin or 0.0),
        "epochs": epochs,
        "rate": rate,
        "rows": count(math.ceil(dataset.train_rows * GENERAL_SHARE), "row"),
        "track": config.track,
    }
    *first, last = (words.format_map(facts) for words in guard.remedy.splitlines())
    command = guard.command.format_map(facts) or None
    return [*(NextStep(words=words) for words in first), NextStep(words=last, command=command)]


def _after_harm(verdict: Verdict, spec: StepSpec) -> list[NextStep]:
    read = "Read the answers that became worse, in the report: wrong or odd data in a new drop shows there."
    if not verdict.blames_new_drops:
        return [NextStep(words=f"{read} No drop is put under suspicion, as the champion was trained on none.")]
    if spec.suspect is not None:
        serves = " If by two models each old drops lost nothing, this model serves." * may_serve(verdict)
        return [
            NextStep(
                words=f"This run tried drop {spec.suspect}. A control, a run without new drops, follows. If this model "
                f"is worse than the control's, too, the drop is suspended.{serves} This lists it with its state.",
                command="dropforge drops",
            ),
            NextStep(words=read),
            NextStep(
                words="If the drop is good, let later runs use it again.",
                command=f"dropforge drops restore {spec.suspect} --reason TEXT",
            ),
            *ways_out(spec.suspect, verdict.lost_drops, spec.config.track),
        ]
    return [
        NextStep(
            words="Wait: the new drops are now tried in turn, except those that were restored. A drop is suspended "
            "only if its trial is worse than the champion and than a control, a model trained without new drops "
            "(gate.trials_per_week = 0 tries none). This lists what is on trial or suspended.",
            command="dropforge drops",
        ),
        NextStep(words=read),
        NextStep(words="If you know which drop is to blame, take it out of later runs.", command=_withdraw(spec)),
    ]


def may_serve(verdict: Verdict) -> bool:
    """
    Return whether the model of a trial may still serve after its control.

    It may if guards of old drops alone stopped it, on the means of two models each.
    """
    return verdict.pooled and verdict.blames_new_drops and is_doubt(verdict)


def ways_out(drop: int, lost: Sequence[int], track: str) -> list[NextStep]:
    """Return what to do if a suspended drop is a correction of older answers, those of the drops `lost`."""
    older = f"{'drop' if len(lost) == 1 else 'drops'} {listed(list(map(str, lost)))}" if lost else "older drops"
    withdraw = f"dropforge drops withdraw {lost[0] if len(lost) == 1 else 'DROP'} --reason TEXT"
    return [
        NextStep(
            words=f"If drop {drop} corrects answers of {older}, do one of these three and then restore it.",
            command=f"dropforge drops restore {drop} --reason TEXT",
        ),
        NextStep(words="Withdraw what is out of date.", command=withdraw),
        NextStep(
            words=f"Or drop all prompts of {older} again with their new answers.",
            command=f"dropforge submit FILE --new-answers --track {track}",
        ),
        NextStep(
            words='Or set gate.on = "pinned" and judge on held-out records of your own.',
            command=f"dropforge submit FILE --heldout --track {track}",
        ),
    ]


def _after_no_proof(verdict: Verdict, dataset: Dataset, spec: StepSpec, adapter: Adapter | None) -> list[NextStep]:
    if verdict.records_needed and verdict.records_needed > MOST_TIMES * verdict.groups:
        words = "Wait for more drops, whose gains add up: held-out records alone will not show a gain as small as this."
    elif verdict.records_needed:
        missing = _records_for(verdict)
        records = count(missing, "more held-out record")
        rows = _rows_for(missing, dataset)
        given = f", which about {count(rows, 'row')} like these give" if rows else ""
        words = f"Drop more data: about {records} would show this gain if it is real{given}."
    elif "p_above_limit" not in verdict.reasons:
        words = "The gain is no luck, but it is small: drop more or other data, or ask for less (gate.min_gain)."
    else:
        words = "Drop more or other data: what is there taught the model nothing that shows."
    again = "Nothing is lost: these drops are trained on again, together with the next ones."
    # A search chooses by dev records, of which there are none where they would be few.
    otherwise = _other_settings(spec.config, adapter) if dataset.dev_rows else []
    return [NextStep(words=words), *otherwise, NextStep(words=again)]


def _proposed(spec: StepSpec) -> list[NextStep]:
    """Return the step for approving held-out records; empty if none wait for approval."""
    if not spec.proposed_rows:
        return []
    wait = count(spec.proposed_rows, "held-out record waits", "held-out records wait")
    words = f"{wait} for your approval: look at the records, then let them count with dropforge drops accept DROP."
    return [NextStep(words=words, command="dropforge drops --state proposed")]


def _other_settings(config: RunConfig, adapter: Adapter | None) -> list[NextStep]:
    """Return the step for a search over settings on the same data; none after a search or full fine-tuning."""
    train = config.train
    if train.trains_full_weights or (adapter is not None and adapter.candidates):
        return []
    words = "Or try other settings on the same data: a search trains with each, and the dev records choose."
    if not train.search.space:
        words += " Name them in [train.search], as space = { learning_rate = [2e-4, 5e-4, 1e-3], rank = [8, 32] }."
    return [NextStep(words=words, command=f"dropforge search {config.track}")]


def _records_for(verdict: Verdict) -> int:
    """Return how many records contain the `records_needed` groups, at today's ratio; 0 if these are unknown."""
    return math.ceil((verdict.records_needed or 0) * max(1, verdict.records) / max(1, verdict.groups))


def _rows_for(records: int, dataset: Dataset) -> int:
    """Return about how many rows yield `records` held-out records, rounded up to two digits; 0 if rows yield none."""
    rows = dataset.train_rows + dataset.dev_rows + dataset.heldout_rows
    if dataset.heldout_pinned or not dataset.heldout_rows:
        return 0
    wanted = records * rows / dataset.heldout_rows
    step = int(10 ** max(0, math.floor(math.log10(wanted)) - 1))
    return math.ceil(wanted / step) * step


def _after_too_little(verdict: Verdict, dataset: Dataset) -> list[NextStep]:
    folder = "Drop a file of records into the track's folder heldout."
    if "too_few_seen" in verdict.reasons:
        words = 'Set gate.on = "all", or a lower gate.min_records: new drops bring no records that the champion knows.'
        return [NextStep(words=words)]
    if "no_pinned_heldout" in verdict.reasons:
        return [NextStep(words=f'{folder} Or set gate.on = "all".')]
    short = dataset.shortfall
    if dataset.heldout_pinned:
        missing = 0 if short is None else short.needed_heldout_rows - short.heldout_rows
        needed = f" {count(missing, 'more is', 'more are')} needed." if missing else ""
        return [NextStep(words=f"{folder}{needed}")]
    if short is not None:
        return [NextStep(words=f"Drop about {count(short.needed_rows, 'more row')} of the same kind.")]
    if verdict.records_needed:
        are = count(_records_for(verdict), "more held-out record is", "more held-out records are")
        return [NextStep(words=f"Drop more rows: {are} needed.")]
    return [NextStep(words="Drop more rows of the same kind.")]
