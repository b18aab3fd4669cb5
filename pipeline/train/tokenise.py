"""Tokenise training rows; rows longer than the window are left out whole, and counted."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.models.prompt import Format, completion_ids, fold, holds_special_token, prompt_ids
from pipeline.train.trainer import TokenRow
from pipeline.words import count

CHECK_EVERY = 500


@dataclass
class Tokeniser:
    """Turns rows into tokens, and counts rows that are too long or hold special tokens."""

    tokenizer: Any
    format: Format
    stops: Sequence[int]
    window: int
    """Most tokens of prompt and answer together."""
    too_long: int = 0
    spelled: int = 0
    """Rows whose text holds a special token of the tokenizer, which is encoded as plain text."""
    lengths: list[int] = field(default_factory=list)

    def tokenise(self, attempt: Attempt, path: Path) -> list[TokenRow]:
        """Return a file's rows that fit into the window. Raises `Interrupted` if the attempt is stopped."""
        self.too_long = self.spelled = 0
        self.lengths = []
        kept = []
        for number, row in enumerate(_rows(path), start=1):
            if number % CHECK_EVERY == 1:
                attempt.check_stop()
            content = fold(row["instruction"], row["input"])
            prompt = prompt_ids(self.tokenizer, self.format, content)
            answer = completion_ids(self.tokenizer, self.format, content, row["output"], self.stops)
            self.lengths.append(len(prompt) + len(answer))
            if self.lengths[-1] > self.window:
                self.too_long += 1
                continue
            self.spelled += holds_special_token(self.tokenizer, content, row["output"])
            kept.append(TokenRow([*prompt, *answer], [0] * len(prompt) + [1] * len(answer), number))
        if self.too_long or self.spelled:
            sys.stderr.write(
                f"{path.name}: {count(len(kept), 'row')} kept; left out whole, never cut: {self.too_long} longer than "
                f"{self.window} tokens; kept with special tokens of the tokenizer as plain text: {self.spelled}\n"
            )
        return kept

    def refuse_none_left(self, rows: Sequence[TokenRow]) -> None:
        """Raise `CannotTrain` if `rows`, from the last file, are empty."""
        if rows:
            return
        shortest, longest = min(self.lengths), max(self.lengths)
        message = (
            f"nothing to train on: the {count(self.too_long, 'training row has', 'training rows have')} "
            f"{shortest} to {longest} tokens, and the window is {self.window}"
        )
        raise CannotTrain(message, f"set train.max_length = {longest}, if the base model's own window allows it")


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    return durable.read_jsonl(path) if path.exists() else ()
