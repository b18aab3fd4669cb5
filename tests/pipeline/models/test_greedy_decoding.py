"""Greedy decoding against the library's own `generate`, one prompt at a time, on tiny models of several kinds."""

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipeline import durable
from pipeline.errors import CannotTrain, Interrupted
from pipeline.metrics.degenerate import degenerate
from pipeline.models import generation, greedy_decoding
from pipeline.models.generation import AskedModel, Decoding
from pipeline.models.template import single_turn
from tests.made_adapters import save_base

RECORDS = 11
NEW_TOKENS = 12
#: Of a sliding window: between the shortest and the longest prompt.
WINDOW = 48


def open_folder(folder: Path) -> AskedModel:
    return generation.open_model(folder, generation.load_template(folder, "chat"), "cpu")


def prompts_of(tiny: Any, folder: Path) -> list[list[int]]:
    """Return prompts of very different lengths that begin alike, the longest in the middle."""
    template = generation.load_template(folder, "chat")
    return [
        template.prompt(single_turn("Which team? " + "x " * 12 * (n % 4) + row["input"]))
        for n, row in enumerate(tiny.rows(RECORDS, seed=3))
    ]


def tokens_alone(asked: AskedModel, prompts: list[list[int]], penalty: float = 1.0) -> list[list[int]]:
    """Return the tokens that the library generates for each prompt by itself."""
    with torch.inference_mode():
        return [
            asked.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                repetition_penalty=penalty,
            )[0, len(prompt) :].tolist()
            for prompt in prompts
        ]


def alone(asked: AskedModel, prompts: list[list[int]], penalty: float = 1.0) -> list[str]:
    """Return what the library generates for each prompt by itself."""
    said = tokens_alone(asked, prompts, penalty)
    return [asked.template.read(tokens) for tokens in said]


def texts(asked: AskedModel, prompts: list[list[int]], size: int, penalty: float = 1.0) -> list[str]:
    decoding = Decoding(NEW_TOKENS, penalty, size)
    return [answer.text for answer in greedy_decoding.answers(asked, prompts, decoding, may_loop=range(RECORDS))]


def third_tokens(asked: AskedModel, prompts: list[list[int]]) -> list[int]:
    """Return what a model says third to two of the prompts: as end tokens, they end some answers early."""
    with torch.inference_mode():
        said = [asked.model.generate(torch.tensor([prompt]), max_new_tokens=3)[0, -1].item() for prompt in prompts[:2]]
    return sorted(set(said))


@pytest.fixture(scope="session")
def ending_llama(tiny: Any, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, some of whose answers end early: an end token is one that it says in the middle of some."""
    folder = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(tiny_llama, folder)
    ends = third_tokens(open_folder(folder), prompts_of(tiny, folder))
    # Its sampling settings must not affect a greedy answer.
    sampling = {"do_sample": True, "temperature": 9.0}
    durable.write_json(folder / "generation_config.json", {"eos_token_id": ends, **sampling})
    return folder


class Passes:
    """Notes rows and columns of every pass of a model, and how wide its cache is after it."""

    def __init__(self, asked: AskedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.widths: list[int] = []
        real = asked.model.forward

        @functools.wraps(real)
        def forward(*given: Any, **named: Any) -> Any:
            self.shapes.append(tuple(named["input_ids"].shape))
            output = real(*given, **named)
            cache = getattr(output, "cache", None) or output.past_key_values
            self.widths.append(cache.get_seq_length())
            return output

        monkeypatch.setattr(asked.model, "forward", forward)


@pytest.mark.parametrize(("size", "penalty"), [(1, 1.5), (4, 1.0), (16, 1.5)])
def test_answers_are_those_of_the_library_given_one_at_a_time(
    tiny: Any, ending_llama: Path, size: int, penalty: float
) -> None:
    asked, prompts = open_folder(ending_llama), prompts_of(tiny, ending_llama)
    assert texts(asked, prompts, size, penalty) == alone(asked, prompts, penalty)
    ended = [answer.ended for answer in greedy_decoding.answers(asked, prompts, Decoding(NEW_TOKENS, 1.0, size))]
    assert set(ended) == {True, False}


def test_the_next_prompt_takes_the_place_of_an_answer_that_is_complete(
    tiny: Any, ending_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = open_folder(ending_llama)
    # They begin differently: a prefix that all share would be read in a pass of its own.
    prompts = [[first, *rest] for first, (_, *rest) in enumerate(prompts_of(tiny, ending_llama), 5)]
    (order,) = greedy_decoding.answer_batches(prompts, 4)
    prompts = [prompts[index] for index in order]
    passes = Passes(asked, monkeypatch)
    found = greedy_decoding.answers(asked, prompts, Decoding(NEW_TOKENS, 1.0, 4), may_loop=range(RECORDS))
    read = [rows for rows, columns in passes.shapes if columns > 1]
    steps = [rows for rows, columns in passes.shapes if columns == 1]
    assert sum(read) == RECORDS
    assert len(read) > RECORDS / 4, "before all four are through"
    assert max(steps) == 4
    assert sum(steps) == sum(answer.tokens - 1 for answer in found), "no token is generated that is not wanted"
    assert max(passes.widths) <= max(map(len, prompts)) + NEW_TOKENS, "what is kept does not grow"


def test_a_prefix_that_all_prompts_share_is_read_once(ending_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = open_folder(ending_llama)
    rows = [[*range(5, 25), *range(30, 31 + number)] for number in range(4)]
    expected = alone(asked, rows)
    likely = [generation.likelihoods(asked, [(row, [7, 8, 9])])[0].nll for row in rows]
    choices = [[5], [6, 7]], [[8, 9, 10], [11]], [[12], [13]], [[14, 15], [16]]
    losses = [generation.choice_likelihoods(asked, [question])[0] for question in zip(rows, choices, strict=True)]
    passes = Passes(asked, monkeypatch)
    assert texts(asked, rows, 4) == expected
    found = generation.likelihoods(asked, [(row, [7, 8, 9]) for row in rows])
    assert [one.nll for one in found] == pytest.approx(likely, rel=1e-4)
    by_choice = generation.choice_likelihoods(asked, list(zip(rows, choices, strict=True)))
    assert by_choice == [pytest.approx(one, rel=1e-4) for one in losses]
    assert [shape for shape in passes.shapes if shape[1] == 20] == [(1, 20)] * 3
    assert max(columns for rows, columns in passes.shapes if rows > 1) == 4 + 3


#: A class of config, and its own names of sizes.
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "sliding window": (transformers.Gemma2Config, {"head_dim": 16, "sliding_window": WINDOW}),
    "own prompts' form": (transformers.GPTNeoXConfig, {}),
    "ALiBi": (transformers.MptConfig, {"expansion_ratio": 2}),
    "recurrent": (transformers.MambaConfig, {}),
    "both": (
        transformers.FalconH1Config,
        {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
        },
    ),
}


@pytest.mark.parametrize(("kind", "options"), KINDS.values(), ids=KINDS)
def test_other_kinds_of_models_are_answered_alike(
    tiny: Any,
    tiny_llama: Path,
    tmp_path: Path,
    kind: type,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, prompts = (
        open_folder(save_base(kind, tiny_llama, tmp_path / "model", **options)),
        prompts_of(tiny, tiny_llama),
    )
    assert min(map(len, prompts)) + NEW_TOKENS < WINDOW < max(map(len, prompts))
    lengths = [2 + 3 * place % 7 for place in range(RECORDS)]
    seen: dict[int, int] = {}

    def is_over(_asked: AskedModel, tokens: list[int], *_: Any, **__: Any) -> bool:
        place = seen.setdefault(id(tokens), len(seen))
        return len(tokens) == lengths[place] or tokens[-1] in asked.template.ends

    # Random models of some kinds say one token for ever: let rows leave one by one all the same.
    monkeypatch.setattr(greedy_decoding, "_is_over", is_over)
    said = tokens_alone(asked, prompts)
    expected = [asked.template.read(tokens[:length]) for tokens, length in zip(said, lengths, strict=True)]
    assert texts(asked, prompts, 4) == expected
    pairs = [(prompt, [7, 8, 9][: 1 + place % 3]) for place, prompt in enumerate(prompts)]
    alone = [generation.likelihoods(asked, [pair])[0].nll for pair in pairs]
    assert [one.nll for one in generation.likelihoods(asked, pairs)] == pytest.approx(alone, rel=1e-4)


def test_a_model_that_keeps_nothing_to_go_on_from_is_refused(tiny: Any, tiny_llama: Path, tmp_path: Path) -> None:
    sizes = {"attention_hidden_size": 32, "context_length": 512}
    asked = open_folder(save_base(transformers.RwkvConfig, tiny_llama, tmp_path / "model", **sizes))
    with pytest.raises(CannotTrain, match="RwkvForCausalLM has no key-value cache"):
        texts(asked, prompts_of(tiny, tiny_llama), 4)


# Loops ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scripted(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[generation.Answer]]:
    """A model that says given texts, as long as it is let: answers(texts, may_loop) returns its answers."""
    asked = open_folder(tiny_llama)
    real = greedy_decoding._Rows.choose

    def answers(said: list[str], may_loop: tuple[int, ...] = ()) -> list[generation.Answer]:
        template = asked.template
        scripts = [[*template.tokenizer.encode(text, add_special_tokens=False), template.ends[0]] for text in said]
        given = [0] * len(said)

        def choose(rows: Any) -> list[int]:
            real(rows)
            for place in rows.indices:
                given[place] += 1
            chosen = [scripts[place][given[place] - 1] for place in rows.indices]
            rows._ids[:, -1] = torch.tensor(chosen)
            return chosen

        monkeypatch.setattr(greedy_decoding._Rows, "choose", choose)
        prompts = [[5, 6, 7]] * len(said)
        return greedy_decoding.answers(asked, prompts, Decoding(400, 1.0, len(said)), may_loop=may_loop)

    return answers


LOOP = "SELECT name " + "AND age > 3 " * 20
TABLE = "| a | b |\n" + "| --- " * 3 + "|\n| invoice | parcel |\n| password | discount |\n"


def test_an_answer_that_loops_is_cut_and_counted_as_a_loop_that_never_ended(scripted: Any) -> None:
    lesser = " ".join(f"{number}" for number in range(100, 180)) + " again" * 40
    short, thrice = "no" + " no" * 31 + ", thank you", "So:" + " one, two, three, four, five," * 3 + " six."
    fine = [TABLE, lesser, short, thrice]
    cut, whole, *others = scripted([LOOP, LOOP, *fine], may_loop=(1,))
    assert not cut.ended
    assert cut.tokens < whole.tokens / 2
    assert LOOP.startswith(cut.text)
    assert degenerate(cut.text, ["SELECT 1"], ended=cut.ended) == ["truncated", "looping"]
    assert (whole.text, whole.ended) == (LOOP, True), "where a reference is a loop itself"
    assert [(one.text, one.ended) for one in others] == [(text, True) for text in fine], "no loop, or not yet"


def test_phrases_that_end_in_another_token_are_not_compared() -> None:
    class Tokens(list[int]):
        slices = 0

        def __getitem__(self, place: Any) -> Any:
            Tokens.slices += isinstance(place, slice)
            return super().__getitem__(place)

    assert not greedy_decoding._repeats(Tokens(range(2000)))
    assert Tokens.slices == 0


def test_what_the_watcher_raises_ends_it_and_the_model_can_be_asked_again(tiny: Any, ending_llama: Path) -> None:
    asked, prompts = open_folder(ending_llama), prompts_of(tiny, ending_llama)
    told: list[tuple[int, int]] = []

    def watch(complete: int, tokens: Sequence[Sequence[int]]) -> None:
        told.append((complete, sum(map(len, tokens))))
        if len(told) == 6:
            message = "asked to stop"
            raise Interrupted(message)

    with pytest.raises(Interrupted):
        greedy_decoding.answers(asked, prompts, Decoding(NEW_TOKENS, 1.0, 4), watch)
    assert told == sorted(told)
    assert told[0] == (0, 4) or told[0][0] > 0
    assert texts(asked, prompts, 4) == alone(asked, prompts)
