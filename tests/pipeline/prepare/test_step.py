"""Splits that cannot leak: what is held out stays held out, whatever is dropped, re-dropped, extended or corrected."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binom

from pipeline.artifacts import Dataset
from pipeline.config import EvaluateConfig, GateConfig, SplitConfig, TrainConfig
from pipeline.data_words import warning_words
from pipeline.decide.explain import clauses, sentence
from pipeline.decide.verdict import early_verdict
from pipeline.errors import CannotTrain, Interrupted
from pipeline.models.tokenizer_files import Window
from pipeline.prepare.step import _max_new_tokens, prepare
from pipeline.records.heldout import normalise, prompt_id
from tests.model_families import write_config
from tests.snapshot import PINNED, Prepared, Snapshot, prompt_place, rows


def test_rows_are_split_about_as_the_fractions_say_and_counted(tmp_path: Path) -> None:
    made = Snapshot(tmp_path).drop(rows(2000)).prepare()
    found = made.dataset
    assert (len(made.train), len(made.dev), len(made.heldout)) == (found.train_rows, found.dev_rows, found.heldout_rows)
    assert found.train_rows + found.dev_rows + found.heldout_rows == 2000
    assert 240 < found.heldout_rows < 360
    assert 35 < found.dev_rows < 90
    assert not found.heldout_pinned
    assert found.shortfall is None
    assert set(made.train[0]) == {"id", "instruction", "input", "output", "drop"}
    assert sorted(path.name for path in made.folder.iterdir()) == ["dev.jsonl", "heldout.jsonl", "train.jsonl"]


def test_the_salt_decides_who_is_held_out_and_the_id_does_not_depend_on_it(tmp_path: Path) -> None:
    one = Snapshot(tmp_path, salt="one").drop(rows(300)).prepare()
    two = Snapshot(tmp_path, salt="two").drop(rows(300)).prepare()
    assert one.ids("heldout") != two.ids("heldout")
    everything = [made.ids("train") | made.ids("dev") | made.ids("heldout") for made in (one, two)]
    assert everything[0] == everything[1]


def test_a_prompt_that_differs_in_case_blanks_or_unicode_form_only_is_the_same(tmp_path: Path) -> None:
    assert normalise("  Ｆｕｌｌ \n WIDTH Straße\u00a0x ") == "full width strasse x"
    assert prompt_id("A  b", "C") == prompt_id("a b", " c ")
    assert prompt_id("ab", "c") != prompt_id("a", "bc")
    # A record whose input was folded into its instruction asks the model the very same thing.
    assert prompt_id("a\n### Input:\nb", "") == prompt_id("a", "b")
    assert prompt_place("s", "a\n### Input:\nb", "") == prompt_place("s", "a", "b")
    assert prompt_place("s", "ab", "c") != prompt_place("sa", "b", "c")
    twins = [{"instruction": "Tell me", "output": "x"}, {"instruction": "tell  ME", "output": "x"}]
    assert Snapshot(tmp_path, gate=PINNED, split=SplitConfig(dev=0)).drop(twins).prepare().dataset.duplicates == 1


def test_several_answers_within_one_drop_are_references_or_rows(tmp_path: Path) -> None:
    content = [{**row, "output": answer} for row in rows(300) for answer in ("first", "second", "first")]
    made = Snapshot(tmp_path).drop(content).prepare()
    assert {tuple(row["references"]) for row in made.heldout} == {("first", "second")}
    assert {row["output"] for row in made.heldout} == {"first"}
    assert made.dataset.heldout_rows == len(made.ids("heldout"))
    assert len(made.train) == 2 * len(made.ids("train"))
    assert made.dataset.duplicates == 300


def test_a_pinned_set_is_the_held_out_set_and_its_prompts_leave_training(tmp_path: Path) -> None:
    pinned = rows(120, start=1000) + rows(10, answer="pinned answer")
    made = Snapshot(tmp_path).drop(rows(200)).drop(pinned, "heldout").prepare()
    found = made.dataset
    assert found.heldout_pinned
    assert made.ids("heldout") == {prompt_id(row["instruction"], "") for row in pinned}
    assert {row["output"] for row in made.heldout} == {"yes", "pinned answer"}
    assert found.removed_heldout == 10
    assert found.train_rows + found.dev_rows == 190
    assert not (made.ids("train") | made.ids("dev")) & made.ids("heldout")


@pytest.mark.parametrize("on", ["all", "seen"])
def test_pinned_records_are_not_the_yardstick_unless_the_settings_say_so(tmp_path: Path, on: Any) -> None:
    """One file of 160 wrong answers replaced a track's whole held-out set, and an always wrong model won, 100 to 0."""
    gate = GateConfig(on=on)
    honest, wrong = rows(1000), [{"instruction": f"Pin {number}?", "output": "wrong"} for number in range(160)]
    before = Snapshot(tmp_path, gate=gate).drop(honest).prepare()
    after = Snapshot(tmp_path, gate=gate).drop(honest).drop(wrong, "heldout").prepare()
    assert (after.heldout, after.train, after.dev) == (before.heldout, before.train, before.dev)
    assert after.dataset.heldout_version == before.dataset.heldout_version
    assert not after.dataset.heldout_pinned
    (said,) = warning_words(after.dataset)
    assert said.startswith(
        f'pinned records only stay out of training, and nothing is judged on them, since gate.on is "{on}"'
    )


def test_pinned_records_that_are_not_judged_on_stay_out_of_training_all_the_same(tmp_path: Path) -> None:
    gate = GateConfig(min_records=1)
    before = Snapshot(tmp_path, gate=gate).drop(rows(1000)).prepare()
    made = Snapshot(tmp_path, gate=gate).drop(rows(1000)).drop(rows(500, answer="no"), "heldout").prepare()
    assert made.heldout == before.heldout
    pinned = {prompt_id(row["instruction"], "") for row in rows(500)}
    assert made.ids("train") | made.ids("dev") == (before.ids("train") | before.ids("dev")) - pinned
    assert made.dataset.removed_heldout == len(pinned - before.ids("heldout"))


def test_a_training_drop_after_the_pinned_one_does_not_change_its_answers(tmp_path: Path) -> None:
    made = Snapshot(tmp_path).drop(rows(30), "heldout").drop(rows(60, answer="poison")).prepare()
    assert {tuple(row["references"]) for row in made.heldout} == {("yes",)}
    assert (made.dataset.removed_heldout, made.dataset.train_rows, made.dataset.replaced) == (30, 30, 0)


def test_the_cap_scores_a_sample_for_each_champion_and_nothing_flows_back_into_training(tmp_path: Path) -> None:
    def after(generation: int, **split: int) -> Prepared:
        snapshot = Snapshot(tmp_path, split=SplitConfig(**split)).drop(rows(1000))
        snapshot.champion = snapshot.champion.model_copy(update={"generation": generation})
        return snapshot.prepare()

    whole, first, again, second = after(1), *(after(number, scored_records=20) for number in (1, 1, 2))
    assert [len(made.heldout) for made in (first, again, second)] == [20, 20, 20]
    assert first.heldout == again.heldout
    assert first.heldout == [row for row in whole.heldout if row["id"] in first.ids("heldout")], "in their order"
    assert len(first.ids("heldout") & second.ids("heldout")) < 10
    assert first.train == second.train == whole.train
    assert after(2).heldout == whole.heldout, "all are scored"
    places = [prompt_place("s", row["instruction"], row["input"]) for row in whole.heldout]
    assert places == sorted(places)
    more = Snapshot(tmp_path, split=SplitConfig(scored_records=20)).drop(rows(2000)).prepare()
    assert not more.ids("train") & whole.ids("heldout")


def test_too_few_dev_rows_go_to_training(tmp_path: Path) -> None:
    def share(row: dict[str, str]) -> float:
        return int(prompt_place("s", row["instruction"], ""), 16) / 2**256

    split = SplitConfig(heldout=0.1, dev=0.2)
    dev = [row for row in rows(1000) if 0.1 <= share(row) < 0.3]
    train = [row for row in rows(1000) if share(row) >= 0.3][:5]
    few = Snapshot(tmp_path, split=split).drop([*dev[:19], *train]).prepare()
    assert (few.dataset.dev_rows, few.dev) == (0, [])
    assert few.dataset.train_rows == len(few.train) == 24
    enough = Snapshot(tmp_path, split=split).drop([*dev[:20], *train]).prepare()
    assert enough.dataset.dev_rows == len(enough.dev) == 20
    assert enough.dataset.train_rows == len(enough.train) == 5
    more = Snapshot(tmp_path, split=split).drop([*dev[:27], *train]).prepare()
    assert more.dataset.dev_rows == len(more.dev) == 27


@pytest.mark.parametrize(
    ("answers", "metric"),
    [
        (["short"] * 4 + ["a b c d e f g"], "exact_match"),
        (["short"] * 3 + ["a b c d e f g"], "rougeL"),
        (["您好，您的退款申请我们已经收到，款项将在三到五个工作日内退回原支付账户。"], "rougeL"),
        (["カスタマーサポート", "返金", "การคืนเงิน", "账户与安全问题"], "exact_match"),
        (['{"a": 1}'] * 8 + ["no"] * 2, "json_f1"),
        (['{"a": 1}'] * 7 + ["no"] * 3, "exact_match"),
    ],
)
def test_the_metric_follows_the_length_and_form_of_the_held_out_answers(
    tmp_path: Path, answers: list[str], metric: str
) -> None:
    pinned = [{"instruction": f"Pinned {number}", "output": answer} for number, answer in enumerate(answers)]
    made = (
        Snapshot(tmp_path)
        .drop(rows(5, answer="a b c d e f g h" if metric == "exact_match" else "x"))
        .drop(pinned, "heldout")
    )
    assert made.prepare().dataset.metric == metric
    chosen = Snapshot(tmp_path, evaluate=EvaluateConfig(metric="token_f1")).drop(rows(50)).prepare()
    assert chosen.dataset.metric == "token_f1"


def test_without_held_out_answers_those_of_training_say_whether_it_is_json(tmp_path: Path) -> None:
    drop = [{"instruction": f"Q {number}", "output": "[1, 2]"} for number in range(20)]
    made = Snapshot(tmp_path, gate=PINNED, split=SplitConfig(heldout=0.0)).drop(drop).prepare()
    assert (made.dataset.heldout_rows, made.dataset.metric) == (0, "json_f1")


def test_the_answer_length_covers_the_longest_held_out_answer(tmp_path: Path) -> None:
    def length(answer: str, **config: Any) -> int:
        pinned = [{"instruction": "Pinned", "output": answer}]
        return (
            Snapshot(tmp_path, **config)
            .drop(rows(5, answer="x" * 900))
            .drop(pinned, "heldout")
            .prepare()
            .dataset.max_new_tokens
        )

    assert length("yes") == 16
    # A key of random letters has nearly as many tokens as letters.
    assert length("a" * 100) == 112
    assert length("日本" * 20) == 128
    assert length("a" * 100_000) == 1024
    assert length("yes", evaluate=EvaluateConfig(max_new_tokens=33)) == 33


def test_rows_that_do_not_fit_are_in_no_split_and_lengthen_no_answer(tmp_path: Path, tiny_llama: Path) -> None:
    """A document of half a megabyte is told by its characters, one of some hundred by its tokens, if it would judge."""
    long = [{"instruction": f"Long {n}", "output": "word-" * (40 if n % 2 else 100_000)} for n in range(60)]
    split = SplitConfig(heldout=0.5, dev=0)
    config = {"base_model": str(tiny_llama), "train": TrainConfig(max_length=64), "split": split}
    made = Snapshot(tmp_path, **config).drop(rows(200) + long).prepare()
    assert made.dataset.max_new_tokens == 16
    assert not any(row["output"].startswith("word") for row in made.heldout)
    # What is not certainly too long, training leaves out by itself: it counts all tokens in any case.
    left = sum(row["output"].startswith("word") for row in made.train)
    assert 0 < left < 30
    assert made.dataset.rows_too_long == 60 - left
    assert len(made.heldout) + len(made.train) == 200 + left


def test_where_many_rows_are_too_long_the_window_that_would_fit_is_said(tmp_path: Path, tiny_llama: Path) -> None:
    config = {"base_model": str(tiny_llama), "train": TrainConfig(max_length=64)}

    def made(long: int, words: int = 300) -> Dataset:
        more = [{"instruction": f"Long {number}", "output": "word " * words} for number in range(long)]
        return Snapshot(tmp_path, **config).drop(rows(1000 - long) + more).prepare().dataset

    few = made(99)
    assert (few.rows_over_window, any("left out whole" in words for words in warning_words(few))) == (99, False)
    many = made(600)
    said = "about 600 of 1,000 records are longer than 64 tokens and left out whole: train.max_length = "
    assert (many.rows_over_window, warning_words(many)[0].startswith(said)) == (600, True)
    most = int(warning_words(many)[0].removeprefix(said).partition(" ")[0])
    assert most < Window(tiny_llama, 9999).limit
    assert warning_words(made(600, 9000))[0].endswith("shorten them, or use another base model")
    fitted = Snapshot(tmp_path, **{**config, "train": TrainConfig(max_length=most)})
    longest = {"instruction": "Long", "output": "word " * 300}
    assert fitted.drop([*rows(100), longest]).prepare().dataset.rows_over_window == 0


def test_rows_that_are_all_too_long_are_refused_with_the_window_that_would_fit(
    tmp_path: Path, tiny_llama: Path
) -> None:
    long = [{"instruction": f"Long {number}", "output": "word-" * 5000} for number in range(30)]
    config = {"base_model": str(tiny_llama), "train": TrainConfig(max_length=64)}
    with pytest.raises(
        CannotTrain, match=r"30 records longer than the window; about 30 of 30 records are longer than 64"
    ):
        Snapshot(tmp_path, **config).drop(long).prepare()


@pytest.mark.parametrize(("longest", "most"), [(0, 16), (5, 16), (100, 208), (600, 1024), (1500, 1504)])
def test_the_answer_length_is_twice_that_of_short_answers_and_cuts_no_long_one(
    tiny_llama: Path, longest: int, most: int
) -> None:
    assert _max_new_tokens(longest, Window(tiny_llama, 4096)) == most


def test_too_few_held_out_records_are_told_with_the_rows_that_are_missing(tmp_path: Path) -> None:
    made = Snapshot(tmp_path, gate=GateConfig()).drop(rows(300)).prepare()
    shortfall = made.dataset.shortfall
    assert shortfall is not None
    assert shortfall.heldout_rows == len(made.heldout) < 100
    assert shortfall.needed_heldout_rows == 100
    missing = 100 - len(made.heldout)
    # Whoever drops so many is not to be refused again: a hash holds out enough of them in 95 of 100 cases.
    assert binom.sf(missing - 1, shortfall.needed_rows, 0.15) == pytest.approx(0.95, abs=0.02)
    long = Snapshot(tmp_path, gate=GateConfig()).drop(rows(300, answer="a b c d e f g")).prepare().dataset
    assert long.metric == "rougeL"
    assert long.shortfall is not None
    assert long.shortfall.needed_heldout_rows == 200
    enough = Snapshot(tmp_path, gate=GateConfig()).drop(rows(1000)).prepare().dataset
    assert enough.shortfall is None


def test_a_gate_on_pinned_records_does_not_judge_without_them(tmp_path: Path) -> None:
    gate = GateConfig(on="pinned", min_records=5)
    made = Snapshot(tmp_path, gate=gate).drop(rows(300)).prepare()
    assert (made.dataset.heldout_rows, made.heldout) == (0, [])
    assert made.dataset.shortfall is not None
    assert made.dataset.shortfall.needed_rows == 5
    few, enough = (
        Snapshot(tmp_path, gate=gate).drop(rows(300)).drop(rows(count, start=900), "heldout").prepare().dataset
        for count in (3, 10)
    )
    assert few.shortfall is not None
    assert (few.shortfall.heldout_rows, few.shortfall.needed_rows) == (3, 2)
    assert (enough.heldout_rows, enough.shortfall) == (10, None)


def test_a_gate_on_seen_records_counts_those_that_the_champion_knows_before_anything_is_trained(tmp_path: Path) -> None:
    """The verdict would say it after the night: only the drops of the champion bring records that count."""
    gate = GateConfig(on="seen", min_records=50)
    made = Snapshot(tmp_path, gate=gate).drop(rows(200)).drop(rows(1000, start=200))
    assert made.prepare().dataset.shortfall is None, "to a base model no record is new"
    made.champion = made.champion.model_copy(update={"drops": (1,), "generation": 1})
    dataset = made.prepare().dataset
    seen = sum(row["drop"] == 1 for row in Prepared(made.root, dataset).heldout)
    assert dataset.shortfall is not None
    assert 10 < dataset.shortfall.heldout_rows == seen < 50 < dataset.heldout_rows
    verdict = early_verdict(dataset, dataset.shortfall, gate)
    assert verdict.reasons == ("too_few_seen",)
    assert sentence(clauses(verdict)) == f"insufficient evidence: {seen} held-out records, and a verdict needs 50"


def test_a_share_of_nothing_is_no_promise_of_more_rows(tmp_path: Path) -> None:
    """A track that began with `gate.on = "pinned"` keeps its share whatever the settings say later."""
    with pytest.raises(CannotTrain, match=r"split\.heldout = 0 holds nothing out") as caught:
        Snapshot(tmp_path, split=SplitConfig(heldout=0), gate=GateConfig()).drop(rows(300)).prepare()
    assert 'set gate.on = "pinned"' in caught.value.hint


def test_no_training_rows_left_is_said_with_where_they_went(tmp_path: Path) -> None:
    with pytest.raises(CannotTrain, match="held-out records only") as caught:
        Snapshot(tmp_path).drop(rows(3), "heldout").prepare()
    assert "drop training data" in caught.value.hint
    with pytest.raises(
        CannotTrain, match="no training records are left of 6: 3 held out, 3 records with prompts of pinned"
    ):
        Snapshot(tmp_path).drop(rows(3)).drop(rows(3), "heldout").prepare()
    almost = [{"instruction": "Question 1? Please answer quickly", "output": "yes"}]
    asked = [{"instruction": "Question 1? Please answer", "output": "yes"}]
    with pytest.raises(CannotTrain, match="1 held out, 1 near-duplicate of a"):
        Snapshot(tmp_path).drop(almost).drop(asked, "heldout").prepare()


def test_a_suite_that_cannot_be_read_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    snapshot = Snapshot(tmp_path, evaluate=EvaluateConfig(general=("builtin", str(tmp_path / "own.jsonl")))).drop(
        rows(9)
    )
    with pytest.raises(CannotTrain, match=r"there is no suite .*own\.jsonl"):
        snapshot.prepare()


def test_a_damaged_or_lost_drop_is_refused_by_name(tmp_path: Path) -> None:
    snapshot = Snapshot(tmp_path).drop(rows(10))
    path = snapshot.root / snapshot.drops[0].path
    path.write_bytes(path.read_bytes().replace(b"yes", b"nay"))
    with pytest.raises(CannotTrain, match=r"drop 1 .* is damaged") as caught:
        snapshot.prepare()
    assert "dropforge drops withdraw 1" in caught.value.hint
    path.unlink()
    with pytest.raises(CannotTrain, match="is gone"):
        snapshot.prepare()


def test_a_row_that_is_no_record_is_refused_by_line(tmp_path: Path) -> None:
    snapshot = Snapshot(tmp_path).drop([*rows(2), {"instruction": "only"}])
    with pytest.raises(CannotTrain, match=r"drop 1 .*, line 3"):
        snapshot.prepare()


def test_the_versions_name_the_content(tmp_path: Path) -> None:
    made = Snapshot(tmp_path).drop(rows(300)).prepare()
    ids = "\n".join(sorted(made.ids("heldout")))
    assert made.dataset.heldout_version == hashlib.sha256(ids.encode()).hexdigest()
    corrected = Snapshot(tmp_path).drop(rows(300, answer="no")).prepare().dataset
    assert corrected.heldout_version == made.dataset.heldout_version
    assert corrected.dataset_sha256 != made.dataset.dataset_sha256


def test_a_stop_is_heeded_in_the_middle_of_a_drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = Snapshot(tmp_path).drop(rows(2500)).attempt()
    told: list[int] = []

    def progress(done: int, _total: int, **_fields: object) -> None:
        told.append(done)
        if done == 1000:
            attempt.stop.set()

    monkeypatch.setattr(attempt, "progress", progress)
    with pytest.raises(Interrupted):
        prepare(attempt)
    assert told == [0, 1000]


FORGED = [{"instruction": f"Say {number} </s>", "output": "yes"} for number in range(40)]


def test_a_base_that_cannot_be_trained_ends_the_run_before_its_data_is_read(tmp_path: Path, tiny_llama: Path) -> None:
    base = write_config(Path(shutil.copytree(tiny_llama, tmp_path / "base")), "deepseek_v3")
    made = Snapshot(tmp_path, base_model=str(base)).drop(rows(40))
    with pytest.raises(CannotTrain, match="in a DeepseekV3ForCausalLM without an adapter"):
        made.prepare()
    made.config = made.config.model_copy(
        update={"base_model": str(tiny_llama), "train": TrainConfig(targets=("c_fc",))}
    )
    with pytest.raises(CannotTrain, match="'c_fc', and the base model has no such linear layer"):
        made.prepare()


def base_with(folder: Path, token: str) -> str:
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    return str(folder / "base")


def test_rows_with_special_tokens_of_the_base_are_on_no_side(tmp_path: Path) -> None:
    base = base_with(tmp_path, "</s>")
    more = [{"instruction": "Question 1000?", "output": "</s>"}, {"instruction": "Q", "input": "a</s>", "output": "b"}]
    made = (
        Snapshot(tmp_path, base_model=base)
        .drop([*rows(60), *FORGED])
        .drop([*rows(30, start=60), *more], "heldout")
        .prepare()
    )
    assert made.dataset.rows_with_special_tokens == 42
    assert all("</s>" not in json.dumps(row) for row in [*made.train, *made.dev, *made.heldout])
    assert len(made.train) + len(made.dev) + len(made.heldout) == 90


def test_a_drop_of_held_out_questions_is_named(tmp_path: Path) -> None:
    snapshot = Snapshot(tmp_path).drop(rows(100)).drop([*rows(21, start=900), *rows(79, start=200)])
    made = snapshot.drop(rows(20, start=300)).drop(rows(25, start=900), "heldout").prepare().dataset
    said = "21 of 100 records are held-out questions and not trained on: if the file should not be there, "
    assert warning_words(made) == [f"d.jsonl: {said}dropforge drops withdraw 2 --reason TEXT"]
    few = Snapshot(tmp_path).drop([*rows(20, start=900), *rows(80, start=200)]).drop(rows(25, start=900), "heldout")
    assert few.prepare().dataset.warnings == ()


def test_a_run_with_nothing_but_held_out_questions_names_their_drop(tmp_path: Path) -> None:
    snapshot = Snapshot(tmp_path).drop(rows(250)).drop(rows(250), "heldout")
    with pytest.raises(CannotTrain, match="no training records are left of 500") as caught:
        snapshot.prepare()
    assert "d.jsonl: 250 of 250 records are held-out questions" in caught.value.message
    assert "dropforge drops withdraw 1 --reason TEXT" in caught.value.message
