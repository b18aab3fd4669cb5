"""A model that is to serve answers first, in a process of its own; with a real, tiny one."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon.champions import promotion, smoke_test
from daemon.champions.smoke_test import Stopped, require_answer
from daemon.state.database import transaction
from pipeline.errors import DropforgeError, StepFailed
from pipeline.models.ask import check
from tests.chaos.house import START, Daemon, build, records


def test_a_model_that_answers_passes(tiny_llama: Path) -> None:
    require_answer(tiny_llama)


def test_weights_that_are_no_numbers_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    import torch  # noqa: PLC0415
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    folder = Path(shutil.copytree(tiny_llama, tmp_path / "nan"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StepFailed, match="not finite"):
        check(folder)


def test_one_that_takes_too_long_is_given_up(tiny_llama: Path) -> None:
    with pytest.raises(DropforgeError, match=r"no answer within 0\.01 s"):
        require_answer(tiny_llama, seconds=0.01)


def test_a_daemon_that_stops_waits_for_no_answer(tiny_llama: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        require_answer(tiny_llama, stop=stop)


def test_a_check_that_dies_without_a_word_is_an_error_with_a_hint(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(DropforgeError, match="its process ended with 1") as refused:
        require_answer(tiny_llama)
    assert "memory" in refused.value.hint


@pytest.mark.long
def test_the_command_loads_the_model_before_anything_moves(
    tiny_llama: Path, tmp_path: Path, dropforge: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path)
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(tiny_llama, tmp_path / "base")
    daemon = Daemon(tmp_path, START)
    for number, outcome in enumerate(("promoted", "worse")):
        (tmp_path / "inbox" / f"{outcome}.jsonl").write_bytes(records(outcome))
        daemon.take_in(START + number)
        daemon.finish_runs(START + number, outcome)

    def generation() -> int:
        with transaction(daemon.engine) as session:
            return promotion.champion(session, "default").generation

    # The scripted models are no models.
    refused = dropforge("promote", "2", "--force", "--reason", "I know better")
    assert (refused.code, "does not answer" in refused.err, "hint: " in refused.err) == (1, True, True)
    assert generation() == 1
    done = dropforge("rollback", "--reason", "it swears")
    assert (done.code, done.err) == (0, "")
    assert f"loading {tmp_path / 'base'} to see that it answers" in done.out
    assert generation() == 2
    monkeypatch.setattr(smoke_test, "find_spec", lambda _name: None)
    forced = dropforge("promote", "2", "--force", "--reason", "I know better")
    assert forced.code == 0
    assert "not loaded, since the training stack is not installed here" in forced.out
    told = json.loads(dropforge("history", "--json").out)["history"]
    assert [one["kind"] for one in told] == ["forced", "rollback", "promotion", "base"]
