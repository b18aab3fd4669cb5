"""An array is read element by element, wherever a block of the file ends."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.records import strict_json
from pipeline.records.strict_json import BrokenArray, elements
from pipeline.records.validate import Options, validate

TEXT = st.text(alphabet='a\\"[]{},:\n\u20ac', max_size=8)
VALUE = st.recursive(
    st.none() | st.integers() | TEXT, lambda some: st.lists(some, max_size=3) | st.dictionaries(TEXT, some, max_size=3)
)


def read(text: str, most: int = 1 << 20) -> list[tuple[int, bytes]]:
    raw: Any = io.BytesIO(text.encode())
    return list(elements(io.BufferedReader(raw), most))


@given(values=st.lists(VALUE, max_size=6), block=st.integers(1, 40), indent=st.sampled_from([None, 1]))
def test_the_elements_are_those_that_json_reads(values: list[Any], block: int, indent: int | None) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strict_json, "_BLOCK_BYTES", block)
        found = read(text)
    assert [json.loads(element) for _, element in found] == values
    lines = text.encode().split(b"\n")
    for line, element in found:
        assert element.split(b"\n")[0] in lines[line - 1]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[", 1, "the file ends before its array does"),
        ('[1,\n "2', 1, "the file ends before its array does"),
        ("[1]\n\n2", 1, "more follows the end of the array"),
        ("[1,\n\n[2, 2, 2, 2, 2, 2],\n3]", 3, "a row has more than 9 bytes"),
        ('[1,\n\n"22222222222', 3, "a row has more than 9 bytes"),
    ],
)
def test_what_cannot_be_read_on_is_told_with_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(BrokenArray, match=words) as raised:
        read(text, 9)
    assert raised.value.line == line


@pytest.mark.parametrize("text", ["a dog, question, cat", "one; answer; two", "a\tb | text | c"])
def test_an_array_is_no_table_whatever_its_texts_list(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": text, "tags": ["a", "input", "b"], "output": "yes"}]))
    assert validate(path, Options()).ok
