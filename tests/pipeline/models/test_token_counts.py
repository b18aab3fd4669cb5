"""What certainly does not fit is told by characters and words, and nothing that fits ever is."""

import json
import shutil
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.tokenizer_files import Window

TEXTS = st.one_of(
    st.text(max_size=200),
    st.lists(st.sampled_from(["billing", "<|im_end|>", "naïve", "日本", "=====", "  ", "\n\n"]), max_size=60).map(
        " ".join
    ),
)


@given(text=TEXTS, most=st.integers(1, 40))
def test_what_is_exceeded_has_more_tokens(tiny_llama: Path, text: str, most: int) -> None:
    window = Window(tiny_llama, most)
    assert window.counts
    if window.is_exceeded(text):
        assert window.count(text) > most


def test_long_texts_are_told_and_without_a_bound_none_is(tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    assert Window(base, 100).is_exceeded("word " * 100, "x")
    assert Window(base, 100).is_exceeded("x" * 10_000)
    assert not Window(base, 100).is_exceeded(" " * 10_000)
    content = json.loads((base / "tokenizer.json").read_text())
    for part in ("pre_tokenizer", "decoder", "post_processor"):
        content[part] = None
    (base / "tokenizer.json").write_text(json.dumps(content))
    assert not Window(base, 100).is_exceeded("x" * 10_000), "what it does not know may be one token, however long"
    (base / "tokenizer.json").unlink()
    assert not Window(base, 100).counts
    assert Window(base, 100).count("日本") == 6


def test_a_tokenizer_that_was_saved_to_cut_texts_counts_them_whole(tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    content = json.loads((base / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (base / "tokenizer.json").write_text(json.dumps(content))
    assert Window(base, 100).count("billing " * 20) == Window(tiny_llama, 100).count("billing " * 20) > 4
