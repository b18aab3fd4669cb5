"""Nothing in training is near to a held-out record, and no held-out record is near to another one."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.artifacts import ModelRef
from pipeline.config import GateConfig, SplitConfig, Unit
from pipeline.data_words import warning_words
from pipeline.metrics.tokens import tokens
from pipeline.models.manifest import TRAINED_IDS, trained_ids, write_trained_ids
from pipeline.prepare import decontaminate
from pipeline.records.heldout import prompt_id, split_hash
from tests.snapshot import Prepared, Snapshot, prompt_place, rows

Row = Mapping[str, Any]
WORDS = list("abcdefghijklmnopqrstu")
LONG = "one answer that has more than eight words in it, number"


def runs(words: Sequence[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[place : place + size]) for place in range(len(words) - size + 1)}


def shingles(words: Sequence[str]) -> set[tuple[str, ...]]:
    return runs(words, 3) or ({tuple(words)} if words else set())


class Oracle:
    """The rules, read aloud: slow, with texts instead of hashes and every pair looked at."""

    def __init__(
        self, content: Sequence[Row], split: SplitConfig, pinned: Sequence[Row] = (), unit: Unit = "prompt"
    ) -> None:
        self.similarity, self.by_document = split.similarity, unit == "document"
        own, others = self.by_prompt(pinned), self.by_prompt(content)
        self.removed = {place: others.pop(place) for place in own if place in others}
        self.prompts = own | others
        most = max(len(self.prompts) // 100, 3)
        self.instructions = self.frequent([(tuple(tokens(row["instruction"])),) for row, *_ in self.all], most)
        self.common = self.frequent([shingles(self.text(row)) for row, *_ in self.all], most)
        self.runs = self.frequent([runs(self.text(row), 13) for row, *_ in self.all], most)
        long = [tuple(tokens(row["output"])) for rows in self.all for row in rows]
        self.answers = self.frequent([[answer] for answer in long if len(answer) >= 8], most)
        self.labels = self.frequent([[answer] for answer in long], max(most, 10))
        by_hash = [place for place in self.prompts if int(self.unit(place)[:13], 16) / 2**52 < split.heldout]
        held = sorted(own or by_hash)
        self.joined: list[str] = []
        for place in held:
            if not any(self.near(place, other) and not self.siblings(place, other) for other in self.joined):
                self.joined.append(place)
        self.repeats = len(held) - len(self.joined)
        self.train = [
            (prompt_id(row["instruction"], row.get("input", "")), row["output"])
            for place in self.prompts.keys() - set(held)
            if not any(self.alike(place, other) for other in self.joined)
            if not any(self.siblings(place, other) for other in held)
            for row in self.prompts[place]
            if not any(self.long([row]) & self.long(self.prompts[other]) for other in self.joined)
        ]

    def unit(self, place: str) -> str:
        words = tokens(self.prompts[place][0].get("input", ""))
        return split_hash("s", "input", " ".join(words)) if self.by_document and len(words) >= 13 else place

    def siblings(self, one: str, other: str) -> bool:
        return self.unit(one) == self.unit(other)

    def hits(self, own: str) -> list[str]:
        """Return the ids of the other prompts with a row that is near to a held-out one that joined, or its unit's."""
        near = {place for place in self.prompts if self.siblings(place, own)}
        for one in filter(lambda other: self.siblings(other, own), self.joined):
            answers = self.long(self.prompts[one])
            near |= {place for place, some in self.removed.items() if answers & self.long(some)}
            near |= {place for place in self.prompts if self.near(place, one)}
        return sorted(map(self.name, near - {own}))

    def name(self, place: str) -> str:
        row = self.prompts[place][0]
        return prompt_id(row["instruction"], row.get("input", ""))

    @staticmethod
    def by_prompt(content: Sequence[Row]) -> dict[str, list[Row]]:
        prompts: dict[str, list[Row]] = {}
        for row in content:
            rows = prompts.setdefault(prompt_place("s", row["instruction"], row.get("input", "")), [])
            if row["output"] not in [other["output"] for other in rows]:
                rows.append(row)
        return prompts

    @property
    def all(self) -> list[list[Row]]:
        return list(self.prompts.values())

    @staticmethod
    def frequent(found: Sequence[Any], most: int) -> set[Any]:
        return {one for one, count in Counter(one for some in found for one in some).items() if count > most}

    def text(self, row: Row) -> list[str]:
        instruction = tokens(row["instruction"])
        return ([] if tuple(instruction) in self.instructions else instruction) + tokens(row.get("input", ""))

    def groups(self) -> list[str]:
        """Return of each that joined the first id of those that it is linked to, over whomever."""
        group = {place: {place} for place in self.joined}
        questions = {place: self.question(place) for place in self.joined}
        for one in self.joined:
            for other in self.joined:
                named = self.labelled(one) & self.labelled(other)
                left, right = questions[one], questions[other]
                alike = len(left & right) >= max(3, 0.65 * self.similarity * len(left | right) - 1e-9)
                if named or alike or self.siblings(one, other):
                    both = group[one] | group[other]
                    group.update(dict.fromkeys(both, both))
        return [min(map(self.name, group[place])) for place in self.joined]

    def question(self, place: str) -> set[str]:
        """Return a prompt's words that are not common, or not in all prompts of its form and in few others."""
        everyone = [set(self.text(row)) for row, *_ in self.all]
        own = set(self.text(self.prompts[place][0]))
        common = own & self.frequent(everyone, max(len(self.prompts) // 100, 3))
        same = [words for words in everyone if len(words & common) > 0.6 * len(common)]
        for word in sorted(common):
            inside = sum(word in words for words in same)
            if inside >= 0.95 * len(same) or inside <= sum(word in words for words in everyone) / 2:
                own.remove(word)
        return own

    def labelled(self, place: str) -> set[tuple[str, ...]]:
        return self.long(self.prompts[place], self.labels)

    def long(self, some: Sequence[Row], common: set[Any] | None = None) -> set[tuple[str, ...]]:
        found = {tuple(tokens(row["output"])) for row in some}
        return {answer for answer in found if len(answer) >= 8} - (self.answers if common is None else common)

    def alike(self, one: str, other: str) -> bool:
        left, right = (self.text(self.prompts[place][0]) for place in (one, other))
        return bool((runs(left, 13) & runs(right, 13)) - self.runs) or self.similar(one, other)

    def similar(self, one: str, other: str) -> bool:
        left, right = (shingles(self.text(self.prompts[place][0])) for place in (one, other))
        both = left - self.common, right - self.common
        shared, union = len(both[0] & both[1]), len(both[0] | both[1])
        partly = bool((left | right) & self.common)
        return union > 0 and shared >= (3 if partly else 1) and shared / union >= self.similarity

    def near(self, one: str, other: str) -> bool:
        return self.alike(one, other) or bool(self.long(self.prompts[one]) & self.long(self.prompts[other]))


INSTRUCTIONS = st.sampled_from(["Say it in French", "Say it in German", ""])


@st.composite
def variants(draw: st.DrawFn) -> dict[str, str]:
    """A row whose text is one of a few, cut and changed a little."""
    start = draw(st.integers(0, 3)) * 5
    words = (WORDS[start:] + WORDS[:start])[: draw(st.integers(2, 20))]
    for _ in range(draw(st.integers(0, 2))):
        words[draw(st.integers(0, len(words) - 1))] = f"w{draw(st.integers(0, 3))}"
    answer = draw(st.sampled_from(["yes", "no", f"{LONG} 1", f"{LONG} 2", f"{LONG} 3"]))
    instruction = draw(INSTRUCTIONS)
    text = " ".join(words)
    return {"instruction": instruction or text, "input": text if instruction else "", "output": answer}


UNITS: st.SearchStrategy[Unit] = st.sampled_from(get_args(Unit))
#: In the training split whatever the salt "s" makes of it, so that no data set is without training rows.
ANCHORS = [
    row
    for number in range(60)
    if int(prompt_place("s", (row := {"instruction": f"anchor{number}", "output": "x"})["instruction"], "")[:13], 16)
    >= 0.5 * 2**52
][:1]


def words(seed: int, count: int) -> str:
    return " ".join(f"w{(seed * 7919 + place * 104_729) % 100_003}" for place in range(count))


def near(text: str, every: int) -> str:
    """Change one word in `every`."""
    return " ".join("changed" if number % every == every - 1 else word for number, word in enumerate(text.split()))


def pinned(tmp_path: Path, train: Sequence[Row], heldout: Sequence[Row], **config: Any) -> Prepared:
    others = rows(5, start=900)
    return Snapshot(tmp_path, **config).drop([*train, *others]).drop(heldout, "heldout").prepare()


def ask(text: str, answer: str = "yes", instruction: str = "") -> dict[str, str]:
    return {"instruction": instruction or text, "input": text if instruction else "", "output": answer}


@pytest.mark.parametrize(
    ("rule", "train", "heldout"),
    [
        ("ngram", ask(f"Before. {words(1, 14)} and more after it"), ask(f"{words(1, 14)} {words(2, 40)}")),
        ("shingles", ask(near(words(1, 60), 12)), ask(words(1, 60))),
        ("shingles", ask("駅まで歩いて行きます"), ask("駅まで歩いて行く")),
        ("answer", ask("One question", f"{LONG} 1"), ask("Something else", f"{LONG.upper()} 1!")),
    ],
)
def test_each_rule_takes_its_rows_out_and_shows_both_texts(tmp_path: Path, rule: str, train: Row, heldout: Row) -> None:
    found = pinned(tmp_path, [train], [heldout]).dataset
    assert (found.train_rows, found.heldout_rows) == (5, 1)
    assert (found.near_duplicates, found.removed_heldout) == (1, 0)
    (example,) = found.overlaps
    field = "output" if rule == "answer" else "instruction"
    assert (example.rule, example.train_text, example.heldout_text) == (
        rule,
        train[field][:300],
        heldout[field][:300],
    )


INSTRUCTION = "Decide which of our teams should answer the following message from a customer of the shop we run"


@pytest.mark.parametrize(("folded", "sample"), [(False, 10_000), (True, 40)])
def test_what_all_rows_have_in_common_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: int, *, folded: bool
) -> None:
    monkeypatch.setattr(decontaminate, "SAMPLE", sample)

    def row(number: int) -> dict[str, str]:
        text = f"{words(number, 9)} thanks"
        if folded:
            return {"instruction": f"{INSTRUCTION}\n{text}", "output": f"{LONG} for all"}
        return {"instruction": INSTRUCTION, "input": text, "output": f"{LONG} for all"}

    made = Snapshot(tmp_path).drop([row(number) for number in range(300)]).prepare()
    found = made.dataset
    assert (found.near_duplicates, found.heldout_duplicates, found.warnings) == (0, 0, ())
    assert found.train_rows + found.dev_rows + found.heldout_rows == 300
    copies = [row(number) for number in range(300)]
    held = {one["instruction"] + one["input"] for one in made.heldout}
    first = next(one for one in copies if one["instruction"] + one.get("input", "") in held)
    key = "instruction" if folded else "input"
    more = [{**first, key: f"{first[key]} {number}"} for number in range(2)]
    later = Snapshot(tmp_path).drop([*copies, *more]).prepare().dataset
    assert later.near_duplicates + later.heldout_duplicates == 2


def test_many_held_out_records_that_repeat_another_one_are_a_warning(tmp_path: Path) -> None:
    heldout = [ask(f"{words(number, 30)} {end}") for number in range(4) for end in ("one", "two")]
    made = pinned(tmp_path, [], heldout).dataset
    assert (made.heldout_rows, made.heldout_duplicates) == (4, 4)
    assert (
        "4 of 8 held-out records are not scored because each is a near-duplicate of another" in warning_words(made)[0]
    )


def test_many_rows_that_leave_are_a_warning_with_what_to_do(tmp_path: Path) -> None:
    heldout = [ask(words(number, 12)) for number in range(25)]
    train = [ask(f"{words(number, 12)} more") for number in range(25)]
    fresh = [ask(words(number, 12)) for number in range(100, 195)]
    made = pinned(tmp_path, [*train, *fresh], heldout).dataset
    assert made.near_duplicates == 25
    assert made.warnings == ()
    (warning,) = warning_words(pinned(tmp_path, [*train, *fresh[:94]], heldout).dataset)
    assert warning.startswith("25 of 124 training records (20%) are left out")
    assert warning.endswith("raise split.similarity (0.5)")
    assert len(made.overlaps) == 10


def test_what_the_champion_was_trained_on_is_not_scored(tmp_path: Path) -> None:
    snapshot = Snapshot(tmp_path, split=SplitConfig(scored_records=30), gate=GateConfig(min_records=30))
    snapshot.champion = ModelRef(model_id="other", path="models/other", generation=1)
    whole = snapshot.drop(rows(300)).prepare()
    folder = snapshot.root / "models" / "m"
    folder.mkdir(parents=True)
    snapshot.champion = ModelRef(model_id="m", path="models/m", generation=1)
    assert snapshot.prepare().heldout == whole.heldout
    seen = [row["id"] for row in whole.heldout[:7]]
    write_trained_ids(folder, [*seen, *whole.ids("train")])
    made = snapshot.prepare()
    assert made.dataset.seen_by_champion == 7
    assert [row for row in made.heldout if row["id"] in whole.ids("heldout")] == whole.heldout[7:]
    assert not made.ids("heldout") & set(seen)
    assert made.train == whole.train
    assert "the champion was trained on 7 of the held-out records" in warning_words(made.dataset)[-1]
    assert (whole.dataset.heldout_rows, made.dataset.heldout_rows, made.dataset.shortfall) == (30, 30, None)
    write_trained_ids(folder, [prompt_id(row["instruction"], "") for row in rows(300)])
    none = snapshot.prepare().dataset
    assert none.heldout_rows == 0
    assert none.shortfall is not None
    assert none.shortfall.heldout_rows == 0


def taught(snapshot: Snapshot, ids: Iterable[str]) -> Snapshot:
    """Give the snapshot a champion that was trained on the prompts with these ids."""
    folder = snapshot.root / "models" / "m"
    folder.mkdir(parents=True, exist_ok=True)
    write_trained_ids(folder, ids)
    snapshot.champion = ModelRef(model_id="m", path="models/m", generation=1, drops=(1,))
    return snapshot


ROLED = st.tuples(st.sampled_from(["train", "heldout"]), st.lists(variants(), min_size=1, max_size=20))


@settings(max_examples=80, deadline=None)
@given(drops=st.lists(ROLED, max_size=4), data=st.data())
def test_splits_near_duplicates_and_groups_are_those_that_all_pairs_give_in_any_order_of_drops(
    tmp_path_factory: pytest.TempPathFactory, drops: list[tuple[str, list[dict[str, str]]]], data: st.DataObject
) -> None:
    """And nothing that the champion was trained on is scored: training rows, repeated held-out ones, removed ones."""
    root = tmp_path_factory.mktemp("pairs")

    def answered(role: str, row: Row) -> dict[str, Any]:
        # A pinned drop may say something else than a training one, but none replaces an answer of its own kind.
        return {**row, "output": f"{LONG} {(len(row['instruction'] + row['input']) + (role == 'heldout')) % 7}"}

    content = [("train", ANCHORS), *((role, [answered(role, row) for row in drop]) for role, drop in drops)]
    train, pinned = ([row for kind, drop in content if kind == role for row in drop] for role in ("train", "heldout"))
    split = SplitConfig(heldout=0.4, dev=0.1, similarity=data.draw(st.sampled_from([0.2, 0.5, 0.9])))
    unit = data.draw(UNITS)
    wanted = Oracle(train, split, pinned, unit)

    def snapshot(some: Sequence[tuple[str, Sequence[Row]]]) -> Snapshot:
        made = Snapshot(root, split=split, unit=unit)
        for role, drop in some:
            made.drop(drop, role)
        return made

    made = snapshot(content).prepare()
    found = [(row["id"], row["near"], row["group"]) for row in made.heldout]
    near = [(wanted.name(place), wanted.hits(place)) for place in wanted.joined]
    assert found == [(*one, group) for one, group in zip(near, wanted.groups(), strict=True)]
    assert made.dataset.heldout_duplicates == wanted.repeats
    left = sorted((row["id"], row["output"]) for row in [*made.train, *made.dev])
    assert left == sorted(wanted.train)
    known = data.draw(st.sets(st.sampled_from(sorted(map(wanted.name, wanted.prompts)))))
    other = snapshot([*data.draw(st.permutations(content)), data.draw(st.sampled_from(content))])
    again = taught(other, known).prepare()
    unknown = [(name, others) for name, others in near if known.isdisjoint([name, *others])]
    assert [(row["id"], row["near"]) for row in again.heldout] == unknown
    assert sorted((row["id"], row["output"]) for row in [*again.train, *again.dev]) == left


def test_two_questions_on_one_document_are_near_each_other_though_its_words_are_common(tmp_path: Path) -> None:
    text = "k l m n o p q r s t u a b c d"
    content = [
        {"instruction": f"Say it in {language}", "input": text, "output": "x"} for language in ("German", "French")
    ]
    others = [{"instruction": " ".join([text, *["e"] * more]), "output": "x"} for more in range(3)]
    split = SplitConfig(heldout=0.4, dev=0.1, similarity=0.2)
    made = Snapshot(tmp_path, split=split, unit="document").drop([*ANCHORS, *content, *others]).prepare()
    ids = [prompt_id(row["instruction"], text) for row in content]
    near = {row["id"]: row["near"] for row in made.heldout}
    assert [near[one] for one in ids] == [[ids[1]], [ids[0]]]


def test_trained_ids_are_sorted_once_each_and_none_for_a_base_model(tmp_path: Path) -> None:
    assert trained_ids(tmp_path) == frozenset()
    names = [f"{number:02}" for number in range(50)]
    write_trained_ids(tmp_path, iter([*reversed(names), "07"]))
    assert (tmp_path / TRAINED_IDS).read_text() == "".join(f"{name}\n" for name in names)
    assert trained_ids(tmp_path) == set(names)
    assert trained_ids(tmp_path, {"07", "c"}) == {"07"}


def test_held_out_rows_say_whether_they_are_pinned_and_what_they_are_about(tmp_path: Path) -> None:
    content = [{**row, "tags": ["b", "a"]} for row in rows(300)]
    content += [{**row, "output": "no", "tags": ["d"]} for row in rows(300)]
    made = Snapshot(tmp_path).drop(content).prepare()
    assert {(row["pinned"], tuple(row["tags"])) for row in made.heldout} == {(False, ("a", "b", "d"))}
    assert all("tags" not in row for row in made.train)
    marked = Snapshot(tmp_path).drop(rows(5)).drop(rows(9, start=900), "heldout").prepare()
    assert {(row["pinned"], tuple(row["tags"])) for row in marked.heldout} == {(True, ())}
