"""
Format turns as prompt and target tokens, for training, evaluation and the merged model's chat template.

Both formats are chat templates: the tokenizer's own, with thinking off and a fixed date, or Alpaca's. The merged model
contains the template. So training uses, token for token, what `apply_chat_template` gives when the model is served.

A special token in a turn's text is encoded as plain text: it can neither end nor forge a turn.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from os.path import commonprefix
from typing import Any, Literal, NamedTuple

from pipeline.errors import CannotTrain
from pipeline.models.untrusted import foreign_code, little_memory
from pipeline.words import count

Format = Literal["chat", "alpaca"]
#: A message: its "role" and its "content".
Turn = Mapping[str, str]
#: The turns before a question, a system message included: role and text of each.
History = Sequence[Sequence[str]]

_ALPACA_HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
)
_ALPACA_TURN = "\n\n### Response:\n"
#: Chat template of a model trained in Alpaca's format. A system message is put before the request.
ALPACA_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- message['content'] + eos_token -}}"
    "{%- elif message['role'] == 'system' -%}{{- message['content'] + '\\n\\n' -}}"
    "{%- else -%}{{- " + repr(_ALPACA_HEAD) + " + message['content'] + " + repr(_ALPACA_TURN) + " -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
#: Put before a template whose default is to think; a request can still turn thinking on.
_NO_THINKING = "{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif -%}"
#: Put before a template that contains today's date: the same prompt must give the same tokens on every day.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{- '2024-07-26' if format == '%Y-%m-%d' else '26 Jul 2024' -}}{%- endmacro -%}"
)
#: A request, an answer and an earlier turn of private characters, which no template changes.
_REQUEST, _ANSWER, _EARLIER = "\uf8fe", "\uf8ff", "\uf8fd"
_OTHER = 'set train.format = "alpaca", or use another base model'


def fold(instruction: str, input: str) -> str:  # noqa: A002 - the record's own field name
    """Return the user message: the instruction; if `input` is not empty, then a line "### Input:" and the input."""
    return f"{instruction}\n### Input:\n{input}" if input else instruction


def single_turn(content: str, answer: str | None = None) -> list[Turn]:
    """Return the turns of the user message `content` and, unless it is `None`, its `answer`."""
    return conversation((), content, answer)


def conversation(history: History, content: str, answer: str | None = None) -> list[Turn]:
    """Return the turns of `history`, of the user message `content` and, unless it is `None`, of its `answer`."""
    said = [*history, ("user", content), *([] if answer is None else [("assistant", answer)])]
    return [{"role": role, "content": text} for role, text in said]


def transcript(turns: History) -> str:
    """Return turns as one text, each below its role."""
    return "\n\n".join(f"{role}:\n{text}" for role, text in turns)


def shown_prompt(instruction: str, given: str, history: History) -> str:
    """Return a prompt to show in a table: the input, or the instruction without one, and how many turns are before."""
    earlier = f" (after {count(len(history), 'earlier turn')})" if history else ""
    return f"{given or instruction}{earlier}"


def alpaca_prompt(content: str) -> str:
    """Return the user message `content` as `ALPACA_TEMPLATE` renders it, up to where the answer begins."""
    return f"{_ALPACA_HEAD}{content}{_ALPACA_TURN}"


def prompt_form(fmt: Format) -> str:
    """Return a phrase that describes the prompt format `fmt` to people; texts in it are quoted as in JSON."""
    alone, both = (json.dumps(fold("{instruction}", given)) for given in ("", "{input}"))
    whole = f"; the template makes {json.dumps(alpaca_prompt('{message}'))} of it" if fmt == "alpaca" else ""
    return f"one user message through the model's chat template: {alone}, or with an input {both}{whole}"


class Treatment(NamedTuple):
    """What a template does with a system message, and with an earlier answer."""

    system: Literal["written", "left out", "refused"]
    answer: Literal["written", "changed", "refused"]


class Template:
    """
    The chat template of a tokenizer, or Alpaca's, which writes prompts and targets.

    A prompt and its target are what the template writes for the turns, up to the end token. No token spans both.
    """

    def __init__(self, tokenizer: Any, fmt: Format, ends: Collection[int]) -> None:
        """
        Use the template for `fmt`; the tokenizer's EOS and `ends` are the tokens that end an answer.

        Raises `CannotTrain` if template or tokenizer fails, or the template leaves out messages or ends a prompt with
        text that it does not write before an answer: the model would not be prompted as it was trained.
        """
        self.tokenizer, self.format = tokenizer, fmt
        self.ends = tuple(sorted({tokenizer.eos_token_id, *ends}))
        with self._foreign("the chat template", "cannot be chosen", "chat_template.jinja"):
            source = str(tokenizer.get_chat_template()) if fmt == "chat" else _alpaca_template(tokenizer)
        self._pattern = _control_pattern(tokenizer, source)
        self._text = self._with_defaults(source) if fmt == "chat" else source
        self.served = None if fmt == "chat" and self._text == source else self._text
        """The merged model's chat template; `None` if it is the tokenizer's own, unchanged."""
        self.opening = self._check()
        """Tokens that the template writes between prompt and answer, as those of `<|channel|>final<|message|>`."""
        added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        self._is_special = any(token in added and added[token].special for token in self.opening)

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """
        Return the token ids of `turns`, up to where the assistant's answer begins.

        Raises `CannotTrain` if chat template or tokenizer fails, or no private character is left (`_Veil`).
        """
        veil = _Veil(self._pattern, turns)
        return self._ids(veil, self._render(veil, turns))

    def target(self, turns: Sequence[Turn]) -> list[int]:
        """
        Return the token ids of the last of `turns`, an answer, which follow the prompt of the turns before it.

        They include the template's opening and an end token: the template's, or the tokenizer's EOS if it writes none.
        Text behind the end token is dropped. Raises `CannotTrain` as `prompt` does, or if the template does not write
        the prompt before the answer.
        """
        veil = _Veil(self._pattern, turns)
        prompt, whole = self._render(veil, turns[:-1]), self._render(veil, turns)
        ids = self._following(veil, prompt, whole)
        end = next((index for index, token in enumerate(ids) if token in self.ends), None)
        return [*ids, self.tokenizer.eos_token_id] if end is None else ids[: end + 1]

    def read(self, tokens: Sequence[int]) -> str:
        """
        Return the text of generated tokens after the template's opening, if it is there, without special tokens.

        It is empty if there are no tokens but a beginning of the opening.
        """
        given, size = tuple(tokens), len(self.opening)
        if given == self.opening[: len(given)]:
            return ""
        # A model that was not trained yet may think first. No answer contains an opening with a special token.
        starts = range(len(given) - size + 1) if self._is_special else range(1)
        begin = next((start + size for start in starts if given[start : start + size] == self.opening), 0)
        return str(self.tokenizer.decode(given[begin:], skip_special_tokens=True))

    def treatment(self) -> Treatment:
        """
        Return what the template does with turns before a question.

        An earlier answer is `changed` if it is not written as a last answer is, and `refused` also if it is left out.
        """
        told = self._try(conversation([("system", _EARLIER)], _REQUEST, _REQUEST))
        system: Literal["written", "left out", "refused"] = "written" if _EARLIER in told else "left out"
        if not told:
            system = "refused"
        after = self._try(conversation([("user", _EARLIER), ("assistant", _ANSWER)], _REQUEST, _REQUEST))
        if not {_EARLIER, _ANSWER} <= set(after):
            return Treatment(system, "refused")
        head, _, tail = self._try(conversation((), _EARLIER, _ANSWER)).partition(_ANSWER)
        end = next(filter(tail.startswith, self.tokenizer.convert_ids_to_tokens(self.ends)), "")
        return Treatment(system, "written" if after.startswith(head + _ANSWER + end) else "changed")

    def _try(self, turns: Sequence[Turn]) -> str:
        """Return rendered turns; an empty text if the template refuses them."""
        try:
            return self._render(_Veil(None, ()), turns)
        except CannotTrain:
            return ""

    def _with_defaults(self, source: str) -> str:
        """Return the template `source` with thinking off and a fixed date, if it has these; sets `self._text`."""
        self._text, plain = source, _Veil(None, ())
        dated = "strftime_now" in source and _FIXED_DATE not in source
        before = self._render(plain, single_turn(_REQUEST))
        self._text = _NO_THINKING + source
        thinks = self._render(plain, single_turn(_REQUEST)) != before
        line = _NO_THINKING * thinks + _FIXED_DATE * dated
        return f"{line}\n{source}" if line else source

    def _check(self) -> tuple[int, ...]:
        """Return the tokens between prompt and answer. Raises `CannotTrain` if the template cannot be trained with."""
        plain = _Veil(None, ())
        prompt, whole = (self._render(plain, single_turn(_REQUEST, answer)) for answer in (None, _ANSWER))
        before, written, _ = whole.partition(_ANSWER)
        if _REQUEST not in prompt or not written:
            raise CannotTrain(f"the chat template in {self.tokenizer.name_or_path} leaves out messages", _OTHER)
        return tuple(self._following(plain, prompt, before))

    def _following(self, veil: "_Veil", prompt: str, whole: str) -> list[int]:
        """Return the tokens of the text `whole` behind `prompt`. Raises `CannotTrain` if it does not begin with it."""
        if not whole.startswith(prompt):
            alone = prompt[len(commonprefix([prompt, whole])) :]
            raise CannotTrain(
                f"the chat template in {self.tokenizer.name_or_path} ends a prompt with {json.dumps(alone[-80:])}, and "
                "does not write that before an answer: a model would not be prompted as it was trained",
                _OTHER,
            )
        head, ids = self._ids(veil, prompt), self._ids(veil, whole)
        return ids[len(head) :] if ids[: len(head)] == head else self._ids(veil, whole[len(prompt) :])

    def _render(self, veil: "_Veil", turns: Sequence[Turn]) -> str:
        """Return the rendered `turns` and, if the last is not the assistant's, the beginning of an answer."""
        with self._foreign("the chat template", "cannot render a request", "chat_template.jinja"), little_memory():
            text = self.tokenizer.apply_chat_template(
                [{**turn, "content": veil.hide(turn["content"])} for turn in turns],
                chat_template=self._text,
                add_generation_prompt=turns[-1]["role"] != "assistant",
                tokenize=False,
            )
        return str(text)

    def _ids(self, veil: "_Veil", text: str) -> list[int]:
        """Return the tokens of a rendered text; what `veil` hides is encoded as plain text."""
        with self._foreign("the tokenizer", "cannot encode a record", "tokenizer.json"):
            return [
                token
                for piece, is_plain in veil.pieces(text)
                for token in self.tokenizer(piece, add_special_tokens=False, split_special_tokens=is_plain)["input_ids"]
            ]

    def _foreign(self, program: str, problem: str, file: str) -> AbstractContextManager[None]:
        what = f"{program} in {self.tokenizer.name_or_path} {problem}"
        return foreign_code(what, f"repair {file} there, or use another base model")


def _alpaca_template(tokenizer: Any) -> str:
    """
    Return Alpaca's template, which begins with the BOS token if the tokenizer adds one to plain text.

    Rendered templates are tokenised without adding special tokens.
    """
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{- bos_token -}}" + ALPACA_TEMPLATE if adds_bos else ALPACA_TEMPLATE


def _control_pattern(tokenizer: Any, template: str) -> re.Pattern[str] | None:
    """Return a pattern of the special tokens, and of added ones that the template names, as `</think>`, or `None`."""
    added: Mapping[int, Any] = tokenizer.added_tokens_decoder
    tokens = {token.content for token in added.values() if token.special or token.content in template}
    longest_first = sorted(filter(str.strip, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


class _Veil:
    """
    Replaces special tokens in turns by private characters while a template is rendered.

    The template's own special tokens are then encoded as such, and the replaced ones as plain text.
    """

    def __init__(self, pattern: re.Pattern[str] | None, turns: Sequence[Turn]) -> None:
        """
        Choose a character that no turn contains for each match of `pattern`.

        Raises `CannotTrain` if the turns contain all private characters: a special token would remain.
        """
        self._pattern = pattern
        texts = [turn["content"] for turn in turns]
        tokens = sorted({token for text in texts for token in pattern.findall(text)}) if pattern is not None else []
        free = (chr(code) for code in range(0xE000, 0xF8FE) if tokens and not any(chr(code) in text for text in texts))
        self._marks = dict(zip(tokens, free, strict=False))
        if len(self._marks) < len(tokens):
            message = (
                "a record contains special tokens and so many private characters (U+E000 to U+F8FE) that none is left"
            )
            raise CannotTrain(message, "remove the private characters from its text")
        self._tokens = {mark: token for token, mark in self._marks.items()}

    def hide(self, text: str) -> str:
        """Return `text`, the content of one of the turns, with each match of the pattern replaced by its character."""
        if not self._marks or self._pattern is None:
            return text
        return self._pattern.sub(lambda match: self._marks[match[0]], text)

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        """Return the parts of a rendered text, tokens put back, and whether each is such a token, now plain text."""
        parts: list[str] = re.split(f"([{''.join(self._tokens)}])", text) if self._tokens else [text]
        return [(self._tokens.get(part) or part, part in self._tokens) for part in parts if part]
