"""The special tokens of a model folder, read without its tokenizer."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.loading import load_tokenizer
from pipeline.models.tokenizer_files import special_tokens, token_pattern


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def test_they_are_those_that_the_tokenizer_itself_has(tiny_llama: Path) -> None:
    tokenizer: Any = load_tokenizer(tiny_llama)
    added = tokenizer.added_tokens_decoder.values()
    assert list(special_tokens(tiny_llama)) == sorted(token.content for token in added if token.special)


def test_every_file_that_names_some_is_read(tmp_path: Path) -> None:
    added = [{"id": 0, "content": "<a>", "special": True}, {"id": 1, "content": "plain", "special": False}, "odd"]
    write(tmp_path, "tokenizer.json", {"version": "1.0", "added_tokens": added, "model": {"vocab": {"x": 1}}})
    write(
        tmp_path,
        "tokenizer_config.json",
        {
            "added_tokens_decoder": {"5": {"content": "<b>", "special": True}, "6": {"content": "x", "special": False}},
            "eos_token": {"content": "<c>"},
            "bos_token": "<d>",
            "pad_token": None,
            "unk_token": "",
            "extra_special_tokens": {"image_token": "<e>"},
        },
    )
    write(tmp_path, "special_tokens_map.json", {"additional_special_tokens": ["<f>", {"content": "<g>"}]})
    assert special_tokens(tmp_path) == ("<a>", "<b>", "<c>", "<d>", "<e>", "<f>", "<g>")


def test_the_vocabulary_behind_the_list_is_not_parsed(tmp_path: Path) -> None:
    listed = '{"content": "<a>", "special": true}'
    write(tmp_path, "tokenizer.json", f'{{"added_tokens":\n [{listed}], "model": {{"vocab": not even JSON')
    assert special_tokens(tmp_path) == ("<a>",)
    write(tmp_path, "tokenizer.json", f'{{"model": {{}}, "added_tokens": [{listed.replace("<a>", "<behind>")}]}}')
    assert special_tokens(tmp_path) == ("<behind>",)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"added_tokens": 7}', '{"added_tokens": [7'])
def test_files_that_are_missing_or_broken_give_none(tmp_path: Path, text: str) -> None:
    assert special_tokens(tmp_path / "nowhere") == ()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        write(tmp_path, name, text)
    assert special_tokens(tmp_path) == ()


def test_a_pipe_and_a_file_without_end_give_none_and_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "special_tokens_map.json").symlink_to("/dev/zero")
    assert special_tokens(tmp_path) == ()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
        write(tmp_path, name, '{"eos_token": "<one>", "added_tokens": [{"content": "<two>", "special": true}]}')
        os.truncate(tmp_path / name, 1 << 30)
    assert special_tokens(tmp_path) == ()


def test_a_tokenizer_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<one>"})
    assert special_tokens(tmp_path) == ("<one>",)
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<another>"})
    assert special_tokens(tmp_path) == ("<another>",)


TOKENS = st.lists(st.text("<|ab>\\", min_size=1, max_size=4), min_size=1, max_size=8)


@given(tokens=TOKENS, text=st.text("<|ab>\\", max_size=12))
def test_the_pattern_finds_the_first_token_and_the_longest_there(tokens: list[str], text: str) -> None:
    each = re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))
    found, wanted = re.search(token_pattern(tokens), text), each.search(text)
    assert (found and found.span()) == (wanted and wanted.span())


def test_a_chain_of_tokens_is_told_apart_without_end() -> None:
    pattern = re.compile(token_pattern(["a" * length for length in range(1, 700)]))
    assert [len(match[0]) for match in pattern.finditer("a" * 1000)] == [699, 301]


def test_hundreds_of_tokens_are_told_apart_by_their_beginnings() -> None:
    assert token_pattern([]) == ""
    assert token_pattern(["</s>", "<s>"]) == "<(?:/s>|s>)"
    many = token_pattern([f"<|reserved_special_token_{number}|>" for number in range(256)])
    assert many.count("reserved") == 1
    assert re.fullmatch(many, "<|reserved_special_token_255|>")
