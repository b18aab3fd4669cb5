"""Bad files of every kind that we know, each with what must be found in it, and clean ones that look odd."""

import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from pipeline.records.validate import Options

TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "</s>",
    "<s>",
    "[INST]",
    "<｜begin▁of▁sentence｜>",
    '<|"|>',
    "<|\\|>",
    "<|a\nb|>",
)
OPTIONS = Options(max_line_bytes=5000, special_tokens=TOKENS)
#: With tokens of ASCII alone, more lines are judged by their bytes.
PLAINER = replace(OPTIONS, special_tokens=tuple(token for token in TOKENS if token.isascii()))
RECORD = {"instruction": "Do it.", "input": "with this", "output": "done"}
GOOD = json.dumps(RECORD).encode()
HEADER = b"instruction,input,output\na,b,c\n"
TALK = {
    "messages": [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": "a", "weight": 1},
        {"role": "assistant", "content": "b", "weight": 0, "tool_calls": []},
        {"role": "human", "content": "c"},
        {"role": "model", "content": "d"},
    ]
}
SAID = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
FIELDS = ("instruction", "input", "output")


class Case(NamedTuple):
    """One file and the one finding that it must give."""

    kind: str
    data: bytes
    rule: str
    line: int | None = 2
    field: str | None = None
    options: Options = OPTIONS


def bad_files() -> list[Case]:
    """Return every kind of bad file."""
    groups = (
        _formats,
        _texts,
        _rows,
        _arrays,
        _json,
        _numbers,
        _encodings,
        _escapes,
        _shapes,
        _names,
        _controls,
        _tokens,
    )
    return [case for group in groups for case in group()]


def clean_files() -> dict[str, bytes]:
    """Return files that are fine though they look odd, by kind."""
    orders = {
        f"keys in the order {', '.join(order)}": json.dumps({key: RECORD[key] for key in order}).encode()
        for order in (FIELDS, FIELDS[::-1], ("input", "instruction", "output"), ("output", "input", "instruction"))
    }
    texts = {
        "line separator": "a\u2028b",
        "next line": "a\x85b",
        "astral": "🙂",
        "right to left": "\u202eשלום",
        "delete": "a\x7fb",
        "zero width": "a\u200db",
        "combining": "e\u0301",
        "byte order mark inside": "a\ufeffb",
        "Japanese": "日本",
        "part of a token": "<|im_end| >",
        "braces": '{"instruction": [',
        "backslashes": "\\\\n",
        "quotes": '"\'"',
        "replacement character": "caf\ufffd",
    }
    written = {
        f"text: {name}, {'escaped' if escaped else 'as it is'}": json.dumps(
            {**RECORD, "input": text}, ensure_ascii=escaped
        ).encode()
        for name, text in texts.items()
        for escaped in (True, False)
    }
    return {
        "byte order mark": b"\xef\xbb\xbf" + GOOD,
        "carriage returns": GOOD + b"\r\n" + GOOD + b"\r\n",
        "blank lines": b"\n\n" + GOOD + b"\n \t\r\n\n" + GOOD,
        "no last newline": GOOD + b"\n" + GOOD,
        "blanks in a line": b' \t{ "instruction" :\t"a" , "output" : "b" } ',
        "no input": b'{"instruction":"a","output":"b"}',
        "empty input": b'{"instruction":"a","input":"","output":"b"}',
        "blank input": b'{"instruction":"a","input":" ","output":"b"}',
        "other keys": json.dumps({**RECORD, "id": 1, "meta": {"a": [1, None, 2.5e3]}, "label": "spam"}).encode(),
        "every escape": rb'{"instruction": "\"\\\/\n\r\t", "output": "b"}',
        "a pair of escapes": rb'{"instruction": "\ud83d\ude00", "output": "b"}',
        "a group": b'{"instruction":"a","output":"b" , "group": "page 7" }',
        "a group before": b'{"group":"","instruction":"a","output":"b"}',
        "array": json.dumps([RECORD, {**RECORD, "input": "[{"}]).encode(),
        "array with a mark": b"\xef\xbb\xbf \n[" + GOOD + b"]\n\n",
        "spread array": json.dumps([RECORD, {**RECORD, "output": 'a\\"],'}], indent=2).encode(),
        "system and history": json.dumps({**RECORD, "system": "s", "history": [["a", "b"], ["c", "d"]]}).encode(),
        "empty system and history": json.dumps({**RECORD, "system": "", "history": [], "chosen": None}).encode(),
        "OpenAI": json.dumps(TALK).encode(),
        "ShareGPT": json.dumps(
            {"conversations": SAID, "system": "s", "group": "g", "tags": ["a"], "tools": "[]"}
        ).encode(),
        "array of messages": json.dumps([TALK, TALK], indent=1).encode(),
        "long line": json.dumps({**RECORD, "output": "x" * 4800}).encode(),
        **orders,
        **written,
    }


def _between(line: bytes) -> bytes:
    return GOOD + b"\n" + line + b"\n" + GOOD + b"\n"


def _row(**fields: Any) -> bytes:
    return _between(json.dumps({**RECORD, **fields}).encode())


def _raw(text: bytes) -> bytes:
    """Return a file whose second record has `text` between the quotes of its output."""
    return _between(b'{"instruction": "a", "output": "' + text + b'"}')


def _zip() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a.jsonl", GOOD)
    return made.getvalue()


def _formats() -> Iterator[Case]:
    """Files that are something else, by their first bytes."""
    text = GOOD.decode()
    magic = {
        "gzip": gzip.compress(GOOD),
        "zip": _zip(),
        "Parquet": b"PAR1\x15\x04",
        "utf-16 with a mark": text.encode("utf-16"),
        "utf-16-be with a mark": b"\xfe\xff" + text.encode("utf-16-be"),
        "array in utf-16": f"[{text}]".encode("utf-16"),
    }
    yield from (Case(kind, data, "format", None) for kind, data in magic.items())


def _texts() -> Iterator[Case]:
    """Text that is something else, by its first line."""
    for kind, data in {
        "CSV": HEADER,
        "CSV with quotes": b'"Instruction","Output"\n"a","b"\n',
        "TSV": HEADER.replace(b",", b"\t"),
        "CSV of another tool": b"id,prompt,completion\n1,a,b\n",
        "spread object": json.dumps(RECORD, indent=2).encode(),
        "spread wrapper": json.dumps({"data": [RECORD]}, indent=1).encode(),
    }.items():
        yield Case(kind, data, "format", None)
    yield Case("wrapper", json.dumps({"version": 1, "data": [RECORD]}).encode(), "json", 1)
    for kind, data in {
        "nothing": b"",
        "blank lines": b"\n \n\r\n",
        "mark alone": b"\xef\xbb\xbf",
    }.items():
        yield Case(kind, data, "empty", None)


def _rows() -> Iterator[Case]:
    """Conversations, and keys that change what is to be learned."""
    keys: dict[str, tuple[str, str, dict[str, Any]]] = {
        "pair of answers": ("unsupported", "chosen", {"chosen": "b"}),
        "mark of a bad answer": ("unsupported", "label", {"label": False}),
        "image": ("unsupported", "images", {"images": ["a.png"]}),
        "history of one": ("minitems", "history", {"history": [["a"]]}),
        "history of numbers": ("type", "history", {"history": [["a", 1]]}),
        "blank in history": ("pattern", "history", {"history": [["a", " "]]}),
        "history text": ("type", "history", {"history": "a"}),
        "long history": ("maxitems", "history", {"history": [["a", "b"]] * 151}),
        "system number": ("type", "system", {"system": 1}),
        "token in history": ("special_token", "history", {"history": [["a", "</s>"]]}),
    }
    for kind, (rule, field, more) in keys.items():
        yield Case(kind, _row(**more), rule, 2, field, replace(OPTIONS, max_line_bytes=50_000))
    for kind, (rule, turns) in {
        "no turn": ("minitems", []),
        "turns as text": ("type", "user: a"),
        "a turn as text": ("type", ["a"]),
        "two questions": ("role", [("user", "a"), ("user", "b"), ("assistant", "c")]),
        "two answers": ("role", [("user", "a"), ("assistant", "b"), ("assistant", "c")]),
        "answer first": ("role", [("assistant", "a"), ("user", "b"), ("assistant", "c")]),
        "system in the middle": (
            "role",
            [("user", "a"), ("assistant", "b"), ("system", "c"), ("user", "d"), ("bot", "e")],
        ),
        "question last": ("role", [("user", "a"), ("assistant", "b"), ("user", "c")]),
        "unknown role": ("role", [("wizard", "a"), ("assistant", "b")]),
        "no role": ("type", [(None, "a"), ("assistant", "b")]),
        "tool turn": ("unsupported", [("user", "a"), ("tool", "b"), ("assistant", "c")]),
        "empty turn": ("blank", [("user", ""), ("assistant", "b")]),
        "list of parts": ("type", [("user", [{"type": "text", "text": "a"}]), ("assistant", "b")]),
        "302 turns": ("maxitems", [("user", "a"), ("assistant", "b")] * 151),
        "token in a turn": ("special_token", [("user", "a"), ("assistant", "b</s>")]),
        "control character in a turn": ("control_character", [("user", "a\x01"), ("assistant", "b")]),
    }.items():
        for key, role, text in (("messages", "role", "content"), ("conversations", "from", "value")):
            said = [{role: turn[0], text: turn[1]} if isinstance(turn, tuple) else turn for turn in turns]
            data = json.dumps({key: turns if isinstance(turns, str) else said}).encode()
            yield Case(f"{key}: {kind}", data, rule, 1, key, replace(OPTIONS, max_line_bytes=50_000))
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    for kind, rule, more in (
        ("half a weight", "weight", {"weight": 0.5}),
        ("true as a weight", "weight", {"weight": True}),
        ("a list as a weight", "weight", {"weight": [1]}),
        ("nothing learned", "weight", {"weight": 0}),
        ("not to train", "unsupported", {"train": False}),
        ("call", "unsupported", {"tool_calls": [{}]}),
    ):
        talk = {"messages": [question, {**answer, **more}]}
        yield Case(kind, json.dumps(talk).encode(), rule, 1, "messages")
    yield Case("no key role", json.dumps({"messages": [{"content": "a"}, answer]}).encode(), "missing", 1, "messages")


def _arrays() -> Iterator[Case]:
    """Arrays, and files of two forms."""
    yield Case("array cut short", b"[" + GOOD + b",", "json", 1)
    yield Case("array with more", b"[" + GOOD + b"]\n" + GOOD, "json", 1)
    yield Case("array of arrays", b"[\n[" + GOOD + b"]]", "type", 2)
    yield Case("comma at the end of an array", b"[" + GOOD + b",\n]", "json", 2)
    yield Case("array of a number", b"[" + GOOD + b",\n7]", "type", 2)
    yield Case("long row in an array", b"[" + GOOD + b",\n" + _line(b"a" * 200_000) + b"]", "json", 2)
    talk = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}).encode()
    yield Case("two forms", GOOD + b"\n" + talk, "form", None)
    yield Case("two forms in a row", json.dumps({**RECORD, "messages": []}).encode(), "form", None)
    yield Case("two conversations in a row", talk[:-1] + b', "conversations": []}', "form", None)


def _json() -> Iterator[Case]:
    """Lines that are no JSON."""
    for kind, line in {
        "missing comma": b'{"instruction": "a" "output": "b"}',
        "comma at the end": b'{"instruction": "a", "output": "b",}',
        "single quotes": b"{'instruction': 'a', 'output': 'b'}",
        "Python None": b'{"instruction": "a", "output": None}',
        "bare keys": b'{instruction: "a", output: "b"}',
        "comment": GOOD + b" // note",
        "cut short": GOOD[:20],
        "no end": GOOD[:-1],
        "two records": GOOD + GOOD,
        "word": b"hello",
        "raw tab": _line(b"a\tb"),
        "raw NUL": _line(b"a\0b"),
        "raw escape": _line(b"a\x1b[0m"),
        "bad escape": _line(rb"\x41"),
        "short escape": _line(rb"\u12"),
        "hexadecimal": b'{"a": 0x1}',
        "typographic quotes": "{“instruction”: “a”}".encode(),
        "mark in the middle": b"\xef\xbb\xbf" + GOOD,
        "no-break space": "\u00a0".encode() + GOOD,
    }.items():
        yield Case(kind, _between(line), "json")
    yield Case("too long", _row(output="x" * 6000), "too_long")
    yield Case("too long and the last", _row() + b"x" * 6000, "too_long", 4)
    for kind, opening in (
        ("deep list", b"["),
        ("deep object", b'{"a":'),
        ("deep value", GOOD[:-1] + b', "x": ' + b"[" * 99_999),
    ):
        yield Case(kind, _between(opening * (1 if kind == "deep value" else 100_000)), "nesting", options=Options())


def _numbers() -> Iterator[Case]:
    """Values that Python reads and JSON does not have, and keys that stand twice."""
    for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"7" * 4400, b"-" + b"7" * 4400, b"[[NaN]]"):
        yield Case(f"number {number[:9].decode()}", _between(GOOD[:-1] + b', "x": ' + number + b"}"), "number")
    for key in FIELDS:
        yield Case(f"{key} twice", _between(GOOD[:-1] + b', "' + key.encode() + b'": "again"}'), "duplicate_key")
    yield Case("output twice, no input", _between(_line(b"a")[:-1] + b', "output": "b"}'), "duplicate_key")
    yield Case("same value twice", _between(GOOD[:-1] + b', "output": "done"}'), "duplicate_key")
    yield Case("another key twice", _between(GOOD[:-1] + b', "x": 1, "x": 1}'), "duplicate_key")
    yield Case("twice inside", _between(GOOD[:-1] + b', "x": {"y": 1, "y": 2}}'), "duplicate_key")
    yield Case("twice by escape", _between(GOOD[:-1] + rb', "outpu\u0074": "again"}'), "duplicate_key")


def _encodings() -> Iterator[Case]:
    """Bytes that are not UTF-8."""
    for kind, text in {
        "Latin-1": b"caf\xe9",
        "overlong": b"\xc0\xaf",
        "surrogate in UTF-8": b"\xed\xa0\x80",
        "beyond Unicode": b"\xf4\x90\x80\x80",
        "cut character": b"\xe6\x97",
        "Shift-JIS": "日本語".encode("shift-jis"),
    }.items():
        yield Case(kind, _raw(text), "encoding")
    yield Case("not UTF-8 in another key", _between(GOOD[:-1] + b', "x": "\xff"}'), "encoding")


def _escapes() -> Iterator[Case]:
    """Halves of characters."""
    for kind, half in {
        "high half": rb"\ud83d",
        "low half": rb"\ude00",
        "half and text": rb"\ud83dx",
    }.items():
        yield Case(kind, _raw(half), "surrogate", 2, "output")
    yield Case("half in a key", _between(GOOD[:-1] + rb', "\udc00": 1}'), "surrogate")
    yield Case("half inside", _between(GOOD[:-1] + rb', "x": ["\udc00"]}'), "surrogate")


def _shapes() -> Iterator[Case]:
    """Values of the wrong kind, missing and blank ones."""
    values: dict[str, Any] = {"number": 7, "true": True, "null": None, "list": ["a"], "object": {"a": "b"}}
    for field in (*FIELDS, "group"):
        for name, value in values.items():
            yield Case(f"{field} is {name}", _row(**{field: value}), "type", 2, field)
    for name, value in {**values, "text": "a", "fraction": 1.5}.items():
        if name != "object":
            yield Case(f"row is {name}", _between(json.dumps(value).encode()), "type")
    for field in ("instruction", "output"):
        row = {key: value for key, value in RECORD.items() if key != field}
        yield Case(f"no {field}", _between(json.dumps(row).encode()), "missing", 2, field)
        for blank in ("", " ", "\n\t\r", "\u3000", "\u00a0", "\u2003\u2028"):
            yield Case(f"{field} is {blank!a}", _row(**{field: blank}), "blank", 2, field)
            if not blank.isascii():
                raw = json.dumps({**RECORD, field: blank}, ensure_ascii=False).encode()
                yield Case(f"{field} is {blank!a} as it is", _between(raw), "blank", 2, field)


def _names() -> Iterator[Case]:
    """Keys that are probably meant to be ours."""
    for name, field in {
        "prompt": "instruction",
        "instructions": "instruction",
        "response": "output",
        "context": "input",
    }.items():
        row = {name if key == field else key: value for key, value in RECORD.items()}
        yield Case(f"key {name!r}", _between(json.dumps(row).encode()), "misnamed_key", 2, field)


def _controls() -> Iterator[Case]:
    """Control characters that are no tab and no line break."""
    for code in (0, 8, 11, 27, 31):
        field = FIELDS[code % 3]
        yield Case(f"U+{code:04X}", _row(**{field: f"a{chr(code)}b"}), "control_character", 2, field)


def _tokens() -> Iterator[Case]:
    """Special tokens of a tokenizer in data, however they are spelled."""
    for number, token in enumerate(TOKENS):
        field = FIELDS[number % 3]
        yield Case(f"token {token!a}", _row(**{field: f"a {token}b"}), "special_token", 2, field)
        plain = json.dumps({**RECORD, field: token}, ensure_ascii=False).encode()
        yield Case(f"token {token!a} as it is", _between(plain), "special_token", 2, field)
    yield Case("token with an escaped slash", _raw(rb"<\/s>"), "special_token", 2, "output")
    yield Case("token in escapes", _raw(rb"\u003c/s\u003e"), "special_token", 2, "output")
    yield Case("token partly in escapes", _raw(rb"<|im\u005fend|>"), "special_token", 2, "output")


def _line(text: bytes) -> bytes:
    return b'{"instruction": "a", "output": "' + text + b'"}'
