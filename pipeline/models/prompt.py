"""
Format a record as prompt and completion tokens, for training, evaluation and the merged model's chat template.

Both formats are chat templates: the tokenizer's own, or Alpaca's, which the merged model then contains. So training
uses, token for token, what `apply_chat_template` of a user message gives when the model is served.

A special token in a record's text is encoded as plain text in every split: it can neither end nor forge a turn.
"""

import json
import re
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, Literal

from pipeline.errors import CannotTrain
from pipeline.models.untrusted import foreign_code

Format = Literal["chat", "alpaca"]

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


#: Placeholder for an answer in a rendered template: a private character, so that no template changes it.
_ANSWER = "\uf8ff"


def fold(instruction: str, input: str) -> str:  # noqa: A002 - the record's own field name
    """Return the user message: the instruction; if `input` is not empty, then a line "### Input:" and the input."""
    return f"{instruction}\n### Input:\n{input}" if input else instruction


def alpaca_prompt(content: str) -> str:
    """Return the user message `content` as `ALPACA_TEMPLATE` renders it, up to where the answer begins."""
    return f"{_ALPACA_HEAD}{content}{_ALPACA_TURN}"


def prompt_form(fmt: Format) -> str:
    """Return a phrase that describes the prompt format `fmt` to people; texts in it are quoted as in JSON."""
    alone, both = (json.dumps(fold("{instruction}", given)) for given in ("", "{input}"))
    whole = f"; the template makes {json.dumps(alpaca_prompt('{message}'))} of it" if fmt == "alpaca" else ""
    return f"one user message through the model's chat template: {alone}, or with an input {both}{whole}"


def choose_format(setting: Literal["auto", "chat", "alpaca"], *, has_chat_template: bool) -> Format:
    """
    Return the format for `train.format`; `auto` is `chat` if there is a chat template, else `alpaca`.

    Raises `CannotTrain` for `chat` without a chat template.
    """
    if setting == "chat" and not has_chat_template:
        message = "train.format is chat, and the base model's tokenizer has no chat template"
        raise CannotTrain(message, 'set train.format = "alpaca" (or "auto"), or use an instruct model as the base')
    if setting == "auto":
        return "chat" if has_chat_template else "alpaca"
    return setting


def template_for(tokenizer: Any, fmt: Format) -> str | None:
    """
    Return the chat template for `fmt`: Alpaca's, or for `chat` `None`, which means the tokenizer's own template.

    Rendered templates are tokenised without adding special tokens, so Alpaca's begins with the BOS token if the
    tokenizer adds one to plain text.
    """
    if fmt == "chat":
        return None
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{- bos_token -}}" + ALPACA_TEMPLATE if adds_bos else ALPACA_TEMPLATE


def prompt_ids(tokenizer: Any, fmt: Format, content: str) -> list[int]:
    """
    Return the token ids of the prompt with the user message `content`, up to where the answer begins.

    Special tokens in `content` are encoded as plain text. Raises `CannotTrain` if chat template or tokenizer fails.
    """
    veil = _Veil(tokenizer, content)
    return veil.ids(veil.render(fmt, content))


def completion_ids(tokenizer: Any, fmt: Format, content: str, output: str, stops: Collection[int]) -> list[int]:
    """
    Return the token ids of the completion: `output`, followed by an end token (one of `stops`).

    Special tokens in `output` are encoded as plain text. Text of the template after the turn's end token is dropped; if
    it has none, the tokenizer's EOS is appended. The ids continue `prompt_ids`: tokens of prompt and answer are never
    merged. Raises `CannotTrain` if chat template or tokenizer fails.
    """
    veil = _Veil(tokenizer, content, output)
    prompt = veil.render(fmt, content)
    # A template may rewrite an answer (strip it, put an empty thought before it): the answer is used unchanged,
    # followed by the template's text after an answer.
    _, written, end = veil.render(fmt, content, _ANSWER).rpartition(_ANSWER)
    tail = veil.hide(output) + (end if written else "")
    head = veil.ids(prompt)
    whole = veil.ids(prompt + tail)
    ids = whole[len(head) :] if whole[: len(head)] == head else veil.ids(tail)
    ends = [index for index, token in enumerate(ids) if token in stops]
    return ids[: ends[0] + 1] if ends else [*ids, tokenizer.eos_token_id]


def stop_ids(tokenizer: Any, generation_eos: int | Collection[int] | None) -> list[int]:
    """Return the sorted ids of the end tokens: the tokenizer's EOS and `generation_eos`, the generation config's."""
    further = [generation_eos] if isinstance(generation_eos, int) else list(generation_eos or [])
    return sorted({tokenizer.eos_token_id, *further})


def special_tokens(tokenizer: Any) -> list[str]:
    """Return the texts of the tokenizer's special tokens, which in data could end or forge a turn."""
    added: Mapping[int, Any] = tokenizer.added_tokens_decoder
    return sorted({str(token.content) for token in added.values() if token.special and token.content})


@lru_cache(maxsize=8)
def _control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    tokens = sorted(special_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


class _Veil:
    """
    Replaces special tokens in data by private characters while a template is rendered.

    The template's own special tokens are then encoded as such, and the replaced ones with `split_special_tokens`, as
    plain text.
    """

    def __init__(self, tokenizer: Any, *texts: str) -> None:
        self._tokenizer = tokenizer
        pattern = _control_pattern(tokenizer)
        self._pattern = pattern
        found = sorted({token for text in texts for token in pattern.findall(text)}) if pattern is not None else []
        free = (chr(code) for code in range(0xE000, 0xF8FF) if found and not any(chr(code) in text for text in texts))
        self._marks = dict(zip(found, free, strict=False))
        self._tokens = {mark: token for token, mark in self._marks.items()}

    def hide(self, text: str) -> str:
        """Return `text` with each special token replaced by a private character."""
        if not self._marks or self._pattern is None:
            return text
        return self._pattern.sub(lambda match: self._marks[match[0]], text)

    def render(self, fmt: Format, content: str, output: str | None = None) -> str:
        """Return the rendered conversation: the request and the answer's beginning, or with the answer `output`."""
        turns = [{"role": "user", "content": self.hide(content)}]
        if output is not None:
            turns.append({"role": "assistant", "content": self.hide(output)})
        with self._foreign("the chat template", "cannot render a request", "chat_template.jinja"):
            text = self._tokenizer.apply_chat_template(
                turns,
                chat_template=template_for(self._tokenizer, fmt),
                add_generation_prompt=output is None,
                tokenize=False,
            )
        return str(text)

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a rendered text."""
        with self._foreign("the tokenizer", "cannot encode a record", "tokenizer.json"):
            if not self._tokens:
                return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            ids: list[int] = []
            for piece in re.split(f"([{''.join(self._tokens)}])", text):
                hidden = self._tokens.get(piece)
                if piece:
                    encoded = self._tokenizer(
                        hidden or piece, add_special_tokens=False, split_special_tokens=hidden is not None
                    )
                    ids += encoded["input_ids"]
            return ids

    def _foreign(self, program: str, problem: str, file: str) -> AbstractContextManager[None]:
        what = f"{program} in {self._tokenizer.name_or_path} {problem}"
        return foreign_code(what, f"repair {file} there, or use another base model")
