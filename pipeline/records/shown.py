"""
Print the first records of a file as the model sees them: prompt and target, as the base model's template writes them.

`python -m pipeline.records.shown < REQUEST`: the request is {"file": PATH, "folder": MODEL, "format": `train.format`,
"window": `train.max_length`, "most": N}. It prints for each record a line {"line": N, "prompt": TEXT, "learned": TEXT,
"words": how long it is}, the middle of a long text left out. On an error the last line is {"error": MESSAGE, "hint":
REMEDY}. It runs in its own process, for callers that must not load the training stack.
"""

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.models.ask import run, say
from pipeline.models.generation import load_template
from pipeline.models.template import conversation, fold
from pipeline.models.untrusted import read_window
from pipeline.records.records import Record, read_records
from pipeline.words import count

#: Most characters of a text that are shown: its beginning and its end.
_BEGIN, _END = 1500, 500


def show(request: dict[str, Any]) -> None:
    """Print a JSON line per record as the module describes, without bad rows. Raises `CannotTrain` or `OSError`."""
    template = load_template(Path(request["folder"]), request["format"])
    window = min(request["window"], read_window(Path(request["folder"])))
    records = (row for row in read_records(Path(request["file"])) if isinstance(row, Record))
    for record in islice(records, request["most"]):
        turns = conversation(record.turns, fold(record.instruction, record.input), record.output)
        ids = template.prompt(turns[:-1]), template.target(turns)
        prompt, learned = (_cut(template.tokenizer.decode(part, skip_special_tokens=False)) for part in ids)
        words = f"{count(sum(map(len, ids)), 'token')}, of which the last {len(ids[1]):,} are learned"
        if sum(map(len, ids)) > window:
            words += f"; it is longer than the window of {window:,} tokens and left out"
        say(line=record.line, words=words, prompt=prompt, learned=learned)


def _cut(text: str) -> str:
    return text if len(text) <= _BEGIN + _END else f"{text[:_BEGIN]} […] {text[-_END:]}"


if __name__ == "__main__":
    sys.exit(run(lambda: show(json.load(sys.stdin)), "see: dropforge doctor"))
