"""One word for one thing: replaced names do not come back, and docs/words.md explains the terms that users meet."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from daemon.state.states import AWAITING, OVERTAKEN, DropState, PromotionKind, RunState
from pipeline.artifacts import Outcome
from pipeline.config import GuardName

ROOT = Path(__file__).parents[1]
#: Each as a whole word, beside what is said instead.
REPLACED = {
    r"exams?|Exams?|Paper|seats?|_?Seat|sitting|sit": "plan, requests, predict",
    r"Sides|spill|Spill|SpilledRow|near_texts|plain_rows": "split, partitions, near_duplicates, fast_path",
    r"control_tokens?|control tokens?|forged": "special_tokens",
    r"Card|card_[a-z]+|[a-z]+_card": "Report, report_*",
    r"established": "seen, unseen",
    r"QUARANTINED|HELD|held back": "crashed (runs), suspended (drops)",
    r"reign(?:s|ed|ing)?|(?<!rule of )succession|barred|sick|passed[_ ]over": "serve, journal, blocked, skipped",
    r"waiting_wins?|[Oo]bstacles?": "blocker",
    r"conclusion|reopening|standing|take_back": "apply_verdict, stale_steps, invalidate",
    r"footprint|named_things|inbox_copy|harness|fitting": "disk_estimate, preflight, submit",
    r"Weighed|Circumstances|[Hh]urdles?|dearest": "Decision",
    r"[KMG]iB": "kB, MB, GB, as all sizes are",
    r"show_only|detectable_power|seen_lost|GuardModel|Resamples|sign[_ ]flips?|costliest": "guards.stop, smallest_gain",
    r"full[_ ]weights|memory (?:does|did) not hold|memory holds": "full fine-tuning, fits into memory",
    r"find_fit|fit_in_processes|_fit|answer_aloud|candidate_words": "plan_memory, train_model, answers",
    r"make_way|set_aside": "reject, free_space",
}
#: In the folders of these steps, whose words were gone through.
REPLACED_IN_STEPS = {
    r"st(?:ands?|ood) against|by heart": "block, memorise",
    r"in (?:4|four) bits|tokens a pass|nats a token": "NF4, micro-batch, per",
    r"near cop(?:y|ies)|too near": "near-duplicate",
    r"cut off|asked to stop|goe?s? on from": "interrupted, stopped, resume",
}
STEPS = ("prepare", "train", "merge", "evaluate", "judge", "decide", "report", "records", "models", "metrics")
#: A first reader did not find these explained.
MISSED = (
    "drop, track, run, candidate, champion, generation, trial, control, suspect, held-out, pinned, group, slice, "
    "anchor, guard, floor, fence, attempt, worth"
)
WORDS = (ROOT / "docs" / "words.md").read_text(encoding="utf-8")
TERMS = re.findall(r"\*\*([^*]+)\*\*", WORDS)
ENDINGS = {".py", ".json", ".md", ".toml", ".jinja", ".css", ".service"}


def files() -> Iterator[Path]:
    for place in ("daemon", "pipeline", "schemas", "systemd"):
        yield from (path for path in (ROOT / place).rglob("*") if path.suffix in ENDINGS)
    yield from (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))


def found(text: str, words: str) -> list[str]:
    return [match[0] for match in re.finditer(rf"\b(?:{words})\b", text)]


@pytest.mark.parametrize(("words", "instead"), [*REPLACED.items(), *REPLACED_IN_STEPS.items()])
def test_a_replaced_word_is_nowhere(words: str, instead: str) -> None:
    steps = {("pipeline", step) for step in STEPS}
    paths = [path for path in files() if words in REPLACED or path.relative_to(ROOT).parts[:2] in steps]
    places = {str(path.relative_to(ROOT)): found(path.read_text(encoding="utf-8"), words) for path in paths}
    assert {place: words for place, words in places.items() if words} == {}, instead


def test_a_word_that_came_back_would_be_found() -> None:
    for text in ("class Exam:", "it reigns", "2 GiB", "drops are held back", "control_tokens", "guards.show_only"):
        assert any(found(text, words) for words in REPLACED)


def messages(source: str) -> Iterator[str]:
    """Yield the texts of several words in a module that are no docstrings."""
    tree = ast.parse(source)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs)
    yield from (node.value for node in texts if isinstance(node.value, str) and " " in node.value)


#: What takes a text apart, or asks how it begins or ends.
PARSERS = {"split", "rsplit", "partition", "rpartition", "removeprefix", "removesuffix", "startswith", "endswith"}
#: What joins our clauses.
JOINT = re.compile("[;:] ")
PAGE = re.compile(r"""\.(?:split|partition)\(["'][;:] """)
#: Of a hook's output, which may be that of a command of ours, the line with the error is shown.
OUTPUT = "line.startswith('hint: ')"


def parsed(source: str) -> Iterator[str]:
    """Yield the calls in a module that look for a joint of a sentence; a constant counts as the text that it is."""
    tree = ast.parse(source)
    texts = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        pattern = ast.unparse(node.func) == "re.compile"
        given = [texts.get(one.id, one) if isinstance(one, ast.Name) else one for one in node.args]
        words = "".join(one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str))
        if (node.func.attr in PARSERS and JOINT.search(words)) or (pattern and "; " in words):
            yield ast.unparse(node)


def test_no_module_parses_our_own_sentences() -> None:
    calls = {
        str(path.relative_to(ROOT)): call
        for room in ("daemon", "pipeline")
        for path in (ROOT / room).rglob("*.py")
        for call in parsed(path.read_text(encoding="utf-8"))
        if call != OUTPUT
    }
    assert calls == {}
    pages = [path for room in ("daemon", "pipeline") for path in (ROOT / room).rglob("*.html*")]
    assert [path.name for path in pages if re.search(PAGE, path.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    "source",
    ['_WON = "promoted: "\nwords.removeprefix(_WON)', 'reason.split("; ", 1)', 're.compile(r"; (answers |drops )")'],
)
def test_a_parsed_sentence_would_be_found(source: str) -> None:
    assert [*parsed(source)]


@pytest.fixture(scope="module")
def shown() -> str:
    """Return what users read but the list itself: documents, templates, settings and messages, in small letters."""
    pages = (ROOT / "daemon/web/templates", ROOT / "pipeline/report/templates", ROOT / "docs")
    paths = [path for folder in pages for path in folder.iterdir() if path.suffix != ".png"]
    paths += [ROOT / "README.md", ROOT / "systemd/dropforge.toml"]
    texts = [path.read_text(encoding="utf-8") for path in paths if path.name != "words.md"]
    modules = (path for room in ("daemon", "pipeline") for path in (ROOT / room).rglob("*.py"))
    texts += [text for path in modules for text in messages(path.read_text(encoding="utf-8"))]
    return "\n".join(texts).lower().replace("_", " ")


def is_used(term: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(term)}s?\b", text) is not None


def test_a_term_is_explained_once_and_is_used(shown: str) -> None:
    assert len(TERMS) == len(set(TERMS))
    assert [term for term in TERMS if not is_used(term, shown)] == []
    assert not is_used("yardstick", shown)


def test_the_terms_that_a_reader_missed_are_explained() -> None:
    assert set(MISSED.split(", ")) - set(TERMS) == set()


def test_every_state_verdict_and_guard_is_named() -> None:
    kinds = {PromotionKind.FORCED, PromotionKind.ROLLBACK, PromotionKind.PROMOTION}
    names = {*DropState, *RunState, *kinds, *get_args(Outcome), *get_args(GuardName), AWAITING, OVERTAKEN}
    named = set(re.findall(r"`([a-z_]+)`", WORDS)) | set(TERMS)
    assert {str(name) for name in names} - named == set()


@pytest.mark.parametrize(
    "place",
    ["README.md", "CONTRIBUTING.md", "daemon/web/templates/base.html", "pipeline/report/templates/origin.html.jinja"],
)
def test_the_list_is_named_where_its_terms_are_read(place: str) -> None:
    assert "docs/words.md" in (ROOT / place).read_text(encoding="utf-8")
