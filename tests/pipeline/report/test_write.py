"""The evidence card: what it says is what the artifacts say, whatever text the records hold."""

import json
import re
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from pipeline import durable
from pipeline.artifacts import AnswerPair, Dataset, FormerScores, GuardResult, Remark, Replacement, Trial
from pipeline.config import TrainConfig
from pipeline.contract import Attempt
from pipeline.decide.policy import GUARDS, label
from pipeline.report.facts import NextStep, Report, Story
from pipeline.report.figures import loss_caption
from pipeline.report.page import MOST_CHARACTERS, render_page
from pipeline.report.story import tell
from pipeline.report.write import pair_lost, pick, write_report
from pipeline.words import plain, signed, ticks

OUTCOMES = ["promoted", "worse", "not_shown_better", "guard_failed", "contaminated", "early"]
VOID = {"meta", "link", "br", "hr"}
#: The elements of a page; no other may come from a text.
TAGS = {
    tag
    for tags in (
        "html head meta link title style body header main section div p span small em bdi code pre h1 h2 h3 ul li",
        "dl dt dd table caption thead tbody tr th td details summary figure figcaption svg desc rect line circle",
        "polyline text",
    )
    for tag in tags.split()
}
#: What a page must not hold: controls but newline and tab, and what turns the order of text.
CONTROL = "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069]"
SCHEMA = json.loads(resources.files("schemas").joinpath("report.schema.json").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """A page as a reader of HTML sees it: elements in their order with attributes, parents and text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[dict[str, Any]] = []
        self._open: list[dict[str, Any]] = []
        self.feed(source)
        self.close()
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        made = {"tag": tag, "text": "", "path": [one["tag"] for one in self._open], **dict(attrs)}
        self.elements.append(made)
        if tag not in VOID:
            self._open.append(made)

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1]["tag"] == tag, f"</{tag}> closes <{self._open[-1]['tag']}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else {"tag": "", "text": ""}
        if inside["tag"] == "pre" and not inside["text"]:
            data = data.removeprefix("\n")
        elif "\n" in data and not data.strip():
            return  # between two lines of a template
        for one in self._open:
            one["text"] += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [one for one in self.elements if one["tag"] == tag]

    def words(self) -> str:
        return str(self.all("body")[0]["text"])


def write(made_reports: Any, folder: Path, outcome: str, *change: Any, **gate: Any) -> tuple[dict[str, Any], str]:
    """Write a card; return report.json and report.html."""
    attempt, verdict = made_reports.case(folder, outcome, *change, **gate)
    return read(folder / write_report(attempt, verdict))


def read(folder: Path) -> tuple[dict[str, Any], str]:
    return durable.read_json(folder / "report.json"), (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cards(made_reports: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], str]]:
    """Return report.json and report.html of a verdict of each kind; of hostile texts, a worse one."""
    found = {outcome: write(made_reports, tmp_path_factory.mktemp(outcome), outcome) for outcome in OUTCOMES}
    folder = tmp_path_factory.mktemp("hostile")
    return {**found, "hostile": write(made_reports, folder, "worse", made_reports.hostile)}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_the_card_is_valid_by_its_strict_schema(cards: dict[str, Any], outcome: str) -> None:
    Draft202012Validator.check_schema(SCHEMA)
    card, _ = cards[outcome]
    validator = Draft202012Validator(SCHEMA)
    validator.validate(card)
    assert Report.model_validate(card).verdict.report == "runs/1/attempts/decide-1/report"
    assert not validator.is_valid({**card, "unknown": 1})
    assert not validator.is_valid({**card, "verdict": {**card["verdict"], "unknown": 1}})
    assert not validator.is_valid({name: value for name, value in card.items() if name != "regressions"})


@pytest.mark.parametrize("outcome", [*OUTCOMES, "hostile"])
def test_the_page_is_one_sound_document_that_loads_nothing_can_be_heard_and_has_no_empty_part(
    cards: dict[str, Any], outcome: str
) -> None:
    _, source = cards[outcome]
    page = Page(source)
    assert page.all("html")[0]["lang"] == "en"
    assert {one["tag"] for one in page.elements} <= TAGS
    assert [one["href"] for one in page.elements if "href" in one] == ["data:,"]
    assert not [name for one in page.elements for name in one if name.startswith("on") or name in {"src", "srcset"}]
    assert "url(" not in page.all("style")[0]["text"]
    assert "@import" not in page.all("style")[0]["text"]
    assert "default-src 'none'" in page.all("meta")[1]["content"]
    assert len(source.encode()) < 300_000
    levels = [int(one["tag"][1]) for one in page.elements if re.fullmatch("h[1-6]", one["tag"])]
    assert (levels[0], levels.count(1)) == (1, 1)
    assert all(after <= before + 1 for before, after in pairwise(levels))
    pictures = [one for one in page.all("svg") if "svg" not in one["path"] and one.get("aria-hidden") != "true"]
    assert len(pictures) == (0 if outcome == "early" else 3)
    assert all(one["role"] == "img" and ": " in one["aria-label"] for one in pictures)
    assert len(page.all("desc")) == len(pictures)
    assert {one["scope"] for one in page.all("th")} == {"col", "row"}
    assert {one["role"] for one in page.all("td")} == {"cell"}
    if outcome == "hostile":
        return
    for one in page.elements:
        if one["tag"] in {"section", "h2", "h3", "p", "ul", "li", "dl", "dd", "dt", "table", "tbody", "tr", "details"}:
            assert one["text"].strip(), f"an empty {one['tag']}"
    outside = re.sub(r"<pre.*?</pre>", "", source, flags=re.DOTALL)
    assert not re.search(r"\b(None|nan|inf)\b(?! of)", outside.partition("<body")[2])
    titles = [one["text"] for one in page.all("h2")]
    assert ("Training" in titles) == (outcome != "early")
    assert ("The data" in titles, "Where it comes from" in titles) == (True, True)


@pytest.mark.parametrize(
    ("outcome", "headline", "words"),
    [
        (
            "promoted",
            "The new model is better. It wins.",
            "The new model serves by itself; only one that you rolled back from before waits for you.",
        ),
        (
            "worse",
            "The new model is worse. The champion stays.",
            "the new drops are now tried in turn, except those that were restored. A drop is suspended only if",
        ),
        (
            "not_shown_better",
            "The new model was not shown to be better. The champion stays.",
            "1,840 more held-out records would show this gain if it is real, which about 12,000 rows like these give.",
        ),
        (
            "guard_failed",
            "A guard blocks the new model. The champion stays.",
            "What it loses: suite builtin −27.6 points (the limit is 5.0 points).",
        ),
        ("contaminated", "This result cannot be trusted. The champion stays.", "38 records of those"),
        ("early", "There is too little data to decide. The champion stays.", "Drop about 460 more rows"),
    ],
)
def test_the_first_screen_says_what_was_decided_why_and_what_to_do(
    cards: dict[str, Any], outcome: str, headline: str, words: str
) -> None:
    card, source = cards[outcome]
    page = Page(source)
    assert page.all("h1")[0]["text"] == headline == card["story"]["headline"]
    first = page.all("header")[0]["text"]
    assert words in first
    assert all(why in first for why in card["story"]["why"])
    assert [step["words"] for step in card["story"]["next_steps"] if step["words"] not in first] == []


def told(made_reports: Any, folder: Path, *failed: GuardResult, **train: Any) -> tuple[Story, str]:
    """Return the story of a winner on track maths that these guards blocked, and all that it says to do."""
    attempt, verdict = made_reports.case(folder, "guard_failed")
    changes = {"track": "maths", "train": TrainConfig(**train)}
    spec = attempt.spec.model_copy(update={"config": attempt.config.model_copy(update=changes)})
    blames = any(guard.guard == "slice" for guard in failed)
    codes = tuple(GUARDS[guard.guard].reason for guard in failed)
    found = verdict.model_copy(update={"reasons": codes, "guards": failed, "blames_new_drops": blames})
    story = tell(found, made_reports.dataset(train_rows=671), None, spec, made_reports.adapter())
    return story, " ".join(f"{step.words} {step.command or ''}" for step in story.next_steps)


@pytest.mark.parametrize("name", sorted(GUARDS))
def test_a_guard_is_told_as_what_it_found_and_what_helps_and_only_some_send_for_the_drops(
    made_reports: Any, tmp_path: Path, name: str
) -> None:
    numbers = {"champion": 75.0, "candidate": 61.7, "records": 120, "margin": 5.0}
    story, to_do = told(made_reports, tmp_path, made_reports.guard(name, "builtin", -13.3, "failed", **numbers))
    meant = GUARDS[name]
    assert story.headline == "A guard blocks the new model. The champion stays."
    assert story.why[-1].startswith(f"{meant.heading}: {meant.tests.format('builtin', 1)}")
    assert all(part in to_do for part in re.split(r"\{\w+\}|\n", meant.remedy))
    assert meant.command.format(track="maths") in to_do
    assert ("tried in turn" in to_do) == ("drops withdraw" in to_do) == (name == "slice")
    assert ("No drop is suspended" in to_do) != (name == "slice")


def test_card_and_advice_have_the_learning_rate_and_epochs_that_were_used(made_reports: Any, tmp_path: Path) -> None:
    _, source = write(made_reports, tmp_path / "card", "promoted")
    words = Page(source).words()
    assert "Epochs2.5Optimizer steps241Peak learning rate0.001" in words
    _, to_do = told(made_reports, tmp_path / "advice", made_reports.guard("general", "x", -13.3, "failed", margin=5.0))
    assert "lower train.epochs (it was 2.5) or train.learning_rate (it was 0.001)." in to_do


def test_of_several_guards_each_has_a_say_and_no_remedy_is_said_twice(made_reports: Any, tmp_path: Path) -> None:
    base, anchor, judge, lost = (
        made_reports.guard(name, "x", -13.3, "failed", margin=5.0)
        for name in ("general_base", "anchor", "judge", "slice")
    )
    story, to_do = told(made_reports, tmp_path / "a", base, base, anchor, judge)
    assert [words.partition(":")[0] for words in story.why[-2:]] == [
        GUARDS[name].heading for name in ("anchor", "judge")
    ]
    assert to_do.count("Add general rows") == 1
    assert "--to GENERATION" in to_do
    assert "whether the judge is right" in to_do
    _, to_do = told(made_reports, tmp_path / "b", lost, base)
    assert "tried in turn" in to_do, "beside the loss of an old drop"


def test_a_win_that_waits_for_a_person_says_how_to_promote_it(made_reports: Any, tmp_path: Path) -> None:
    card, source = write(made_reports, tmp_path, "promoted", approval="manual")
    assert "It waits for your approval." in Page(source).all("h1")[0]["text"]
    assert "dropforge promote 1" in [step["command"] for step in card["story"]["next_steps"]]


def test_new_answers_to_old_questions_stand_beside_the_old_ones(made_reports: Any, tmp_path: Path) -> None:
    old = made_reports.HOSTILE
    pair = AnswerPair(old_drop=3, old_prompt=old, old_answer=old + "old", new_drop=9, new_answer=old + "new")
    attempt, verdict = made_reports.case(tmp_path, "promoted")
    path = tmp_path / attempt.spec.inputs["prepare"]
    proposals = tuple(Replacement(old=3, new=new, rows=25) for new in (4, 5, 6, 7, 8, 9))
    data = made_reports.dataset(proposals=proposals, proposed_answers=(pair,) * 30)
    durable.write_json(path, data.model_dump(mode="json"))
    _, source = read(tmp_path / write_report(attempt, verdict))
    page = Page(source)
    words = "150 records bring new answers to old questions: they are neither trained on nor judged by"
    assert f"{words} until you accept them, drop by drop: dropforge drops accept 9 --answers, " in page.words()
    assert page.words().count("--answers") == 5
    cells = [one["text"] for one in page.all("td") if one["text"].endswith(("old", "new"))]
    assert [cell[-3:] for cell in cells] == ["old", "new"] * 20
    assert all(cell.startswith("<script>") for cell in cells)
    assert {one["tag"] for one in page.elements} <= TAGS
    assert not re.search(CONTROL, source)


def test_the_card_of_a_trial_shows_lost_records_beside_the_rows_of_its_drop_most_like_them(
    made_reports: Any, tmp_path: Path
) -> None:
    def asking(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        texts = (f"What does the plan number {place} <b>cost</b> a month today?" for place in range(len(lines)))
        return [{**line, "input": next(texts)} for line in lines]

    attempt, verdict = made_reports.case(tmp_path, "worse", asking)
    verdict = verdict.model_copy(update={"lost_drops": (1,)})
    lines = list(durable.read_jsonl(tmp_path / "runs/1/attempts/evaluate-1/report/records.jsonl"))
    lost = [line["input"] for line in lines if line["drop"] == 1 and line["candidate"]["scores"]["exact_match"] < 1]
    attempt = Attempt(attempt.spec.model_copy(update={"suspect": 3}))
    assert read(tmp_path / write_report(attempt, verdict))[0]["lost_pairs"] == [], "its data is gone"
    (tmp_path / attempt.spec.folder / "report").rename(tmp_path / "first")

    def row(drop: int, text: str) -> dict[str, Any]:
        return {"drop": drop, "instruction": text, "input": "", "output": "9<i>" + "x" * 9000}

    like = [line["input"] for line in lines if line["input"] not in lost] + lost[3:8]
    rows = [row(3, f"{start}: {text}") for start in ("It is worth asking", "Say", "I ask of you") for text in like]
    rows += [
        *(row(1, text) for text in lost),
        row(3, f"{lost[13]}, {lost[14]}"),
        row(3, "How many stars does this review give?"),
    ]
    folder = tmp_path / attempt.load(Dataset).folder
    folder.mkdir(parents=True)
    durable.write_bytes(folder / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    card, source = read(tmp_path / write_report(attempt, verdict))
    page, pairs = Page(source), card["lost_pairs"]
    found = [(pair["old_prompt"], pair["new_prompt"]) for pair in pairs]
    assert found[:5] == [(text, f"Say: {text}") for text in lost[3:8]], "what all have in common does not count"
    assert found[5:] == [(lost[13], f"{lost[13]}, {lost[14]}")], "a row is shown once"
    assert {(pair["old_drop"], pair["new_drop"], len(pair["new_answer"])) for pair in pairs} == {(1, 3, 300)}
    assert len(pair_lost(lines, "exact_match", (), [row(3, text) for text in lost], 3)) == 8
    cells = [one["text"] for one in page.all("td") if one["text"].startswith(("Say: ", "9<i>"))]
    assert len(cells) == 11
    assert {one["tag"] for one in page.elements} <= TAGS


def test_every_part_of_the_evidence_is_on_the_page(made_reports: Any, tmp_path: Path) -> None:
    card, source = write(made_reports, tmp_path, "guard_failed")
    words = Page(source).words()
    verdict, data, adapter = card["verdict"], card["dataset"], card["adapter"]
    for value in (
        data["dataset_sha256"],
        data["heldout_version"],
        adapter["adapter_sha256"],
        adapter["base_model_id"],
        verdict["candidate_model_id"],
        verdict["champion_model_id"],
        *(drop["sha256"] for drop in card["drops"]),
        *(drop["name"] for drop in card["drops"]),
        *card["evaluation"]["prediction_keys"].values(),
        "torch 2.10.0",
        *(label(GuardResult.model_validate(guard)) for guard in verdict["guards"]),
        *(one["label"] for one in verdict["slices"]),
        f"{verdict['wins']} better",
        f"{verdict['losses']} worse",
        f"{verdict['ties']} equal",
        signed(verdict["gain"]),
        plain(verdict["candidate_score"]),
        plain(verdict["champion_score"]),
        "smallest gain that is promoted in 8 of 10 cases: +5.9",
        "smallest gain that promotes: +1.0",
        "6 candidates before this one, 2 of them on exactly these records",
        "Not listed: 12 drops and tags of too few records to decide anything.",
        "500 held-out records or documents count as 300, since some ask the same in other words",
        data["overlaps"][0]["train_text"],
        "402,133",
        "1 h 10 min",
    ):
        assert value in words, value


def test_the_card_says_how_many_records_each_former_champion_is_compared_on(made_reports: Any, tmp_path: Path) -> None:
    def former(generation: int, records: int) -> FormerScores:
        return FormerScores(generation=generation, model_id="m", records=records, score=None, file="f")

    card = Report.model_validate(write(made_reports, tmp_path, "promoted")[0])
    assert card.evaluation is not None
    evaluation = card.evaluation.model_copy(update={"former": (former(3, 1240), former(2, 0)), "records": 2000})
    words = " ".join(Page(render_page(card.model_copy(update={"evaluation": evaluation}))).words().split())
    assert "answered before: generation 3 on 1,240 of 2,000, generation 2 on 0 of 2,000." in words


def test_the_card_shows_all_that_a_search_tried(made_reports: Any, tmp_path: Path) -> None:
    attempt, verdict = made_reports.case(tmp_path, "promoted")
    candidates = (
        Trial(number=1, settings={"rank": 8}, outcome="finished", dev_loss=0.71, seconds=60),
        Trial(number=2, settings={"rank": 16}, outcome="finished", dev_loss=0.62, seconds=70, chosen=True),
        Trial(number=3, settings={"rank": 32}, outcome="failed", seconds=5, why="training diverged: <b>"),
    )
    adapter = made_reports.adapter().model_copy(update={"candidates": candidates})
    durable.write_json(tmp_path / attempt.spec.inputs["train"], adapter.model_dump(mode="json"))
    words = Page(read(tmp_path / write_report(attempt, verdict))[1]).words()
    by = "Chosen by the lowest dev loss, and never by a held-out record"
    for said in (by, "rank 8", "0.710", "rank 16", "✓ chosen", "rank 32", "failed: training diverged: <b>"):
        assert said in words, said


def test_the_card_says_which_weights_the_model_has(made_reports: Any) -> None:
    told = "dev loss 0.55 at the end, 0.52 at its lowest, at step 140: the model has the last step's weights. Nats"
    assert told in loss_caption(made_reports.adapter())


def test_each_guard_is_a_row_with_its_limit_and_its_value_and_failed_ones_come_first(cards: dict[str, Any]) -> None:
    _, source = cards["guard_failed"]
    page = Page(source)
    rows = [one["text"] for one in page.all("tr")]
    marked = [row for row in rows if "✓" in row or "✗" in row]
    assert re.match(r"suite builtin58\.831\.2−27\.6 points.*5\.0 points.*✗ failed$", marked[0])
    for said in ("1 of 8 failed.", "shown only"):
        assert said in page.words()
    assert [row for row in rows if row.startswith("suite builtin against the base model56.7the base model50.0")]
    assert source.count("<small>the base model</small>") == 1


def test_the_page_shows_a_hostile_text_as_text(made_reports: Any, cards: dict[str, Any]) -> None:
    card, source = cards["hostile"]
    shown = [one["text"] for one in Page(source).all("pre")]
    plainly = made_reports.HOSTILE.replace("\x1b", "\\x1b").replace("\x00", "\\x00").replace("\u202e", "\\u202e")
    assert plainly in shown
    assert made_reports.HOSTILE in [one["instruction"] for one in card["regressions"]], "report.json holds it as it is"
    assert {one.get("dir") for one in Page(source).all("pre")[:-1]} == {"auto"}, "all but the settings"
    assert Page(source).all("title")[0]["text"] == "Worse: run 1 of track default"


def test_the_ten_worst_and_the_ten_best_are_chosen_by_their_change(made_reports: Any) -> None:
    lines = [made_reports.row(place, (place % 23) / 23, (place % 7) / 7) for place in range(200)]
    worst, best = pick(lines, "token_f1")
    assert pick(lines[::-1], "token_f1") == (worst, best)
    changes = sorted(100 * ((place % 23) / 23 - (place % 7) / 7) for place in range(200))
    assert [one.difference for one in worst] == pytest.approx(changes[:10])
    assert [one.difference for one in best] == pytest.approx(changes[:-11:-1])


def test_a_long_text_is_cut_and_the_page_says_so(made_reports: Any, tmp_path: Path) -> None:
    def longer(lines: list[Any]) -> list[Any]:
        return [{**line, "candidate": {**line["candidate"], "text": "word " * 4000}} for line in lines]

    card, source = write(made_reports, tmp_path, "worse", longer)
    answer = card["regressions"][0]["candidate"]
    assert (len(answer["text"]), answer["characters"]) == (MOST_CHARACTERS + 1, 20_000)
    assert "the first 3,000 of 20,000 characters" in Page(source).words()
    assert len(source) < 300_000


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text())
def test_any_text_is_shown_as_text_wherever_it_stands(made_reports: Any, words: str) -> None:
    words = f"<{words}>"
    dataset, verdict = made_reports.early()
    warning = Remark(code="heldout_questions", numbers={"name": words, "rows": 1, "total": 2, "drop": 3})
    guard = GuardResult(guard="slice", about=(words,), unit="points", change=0.0, margin=2.0, state="passed")
    source = render_page(
        Report(
            run=1,
            track=words,
            story=Story(headline=words, why=(words,), next_steps=(NextStep(words=words, command=words),)),
            metric_title="exact match",
            verdict=verdict.model_copy(update={"guards": (guard,)}),
            drops=(),
            dataset=dataset.model_copy(update={"warnings": (warning,)}),
            settings={words: words, "gate": {"min_gain": 1.0, "p_value": 0.01}},
        )
    )
    assert re.search(CONTROL, source) is None
    page = Page(source)
    (headline,) = (one["text"] for one in page.all("h1"))
    escapes = r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\r"
    assert re.sub(escapes, "", headline) == re.sub(escapes, "", re.sub(CONTROL, "", words))
    pictures = [one["aria-label"].partition(": 0 %")[0] for one in page.all("svg")]
    told = [one["text"] for tag in ("bdi", "li", "code") for one in page.all(tag)]
    warnings = [one["text"] for one in page.all("p") if one.get("class") == "warning"]
    assert [one.partition(": 1 of 2 records")[0] for one in warnings] == [headline]
    assert {*pictures, *told} == {headline, headline * 2}, "a step and its command are one entry of a list"
    assert {one["tag"] for one in page.elements} <= TAGS


def test_no_template_calls_a_text_safe() -> None:
    folder = resources.files("pipeline.report").joinpath("templates")
    sources = {one.name: one.read_text(encoding="utf-8") for one in folder.iterdir()}
    assert {"report.html.jinja", "style.css"} <= set(sources)
    for name, source in sources.items():
        assert not re.search(r"\|\s*safe|autoescape|Markup|<script|=\s*\{\{", source), name


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4))
def test_ticks_are_few_within_and_evenly_apart(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert len(found) <= 7
    assert all(low - 1e-6 <= value <= low + width + 1e-6 for value in found)
    apart = {round(second - first, 6) for first, second in pairwise(found)}
    assert len(apart) <= 1
