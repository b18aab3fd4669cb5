"""The whole way: a run is promoted, the daemon runs `serve-hook`, and the server has it or the former comes back."""

import json
import sys
from pathlib import Path

from sqlmodel import col, select

from daemon.champions.hooks.changes import Hooks
from daemon.state.database import transaction
from daemon.state.tables import Promotion
from tests.chaos.house import START, Daemon
from tests.daemon.champions.test_approval import House
from tests.recorded import record
from tests.settled_hooks import settle
from tests.stand_in_server import StandIn, write_answers

OWN, OTHER = "by the candidate", "of the champion"
PROMPTS = [f"say\n### Input:\nword {number}" for number in range(8)]


def serve_hook(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "daemon", "serve-hook", *arguments, "--wait", "60"]


def promote(folder: Path, after: list[str], health: list[str]) -> Daemon:
    """Let a run be promoted whose answers are known; its adapter answers as it does."""
    house = House(folder, f"[hooks]\nafter_promotion = {json.dumps(after)}\nhealth = {json.dumps(health)}\n")
    house.run()
    daemon = house.daemon
    record(daemon, [OWN] * 8, [OTHER] * 8)
    write_answers(daemon.root / "runs" / "1" / "attempts" / "train-1", dict.fromkeys(PROMPTS, OWN))
    return daemon


def settled(daemon: Daemon) -> list[tuple[str, str | None, str | None]]:
    """Let the commands come to their end; return each change with what became of them."""
    settle(Hooks(daemon.engine, daemon.settings, try_out=lambda *_, **__: None), START)
    with transaction(daemon.engine) as session:
        rows = session.exec(select(Promotion).order_by(col(Promotion.generation))).all()
        print([(row.hook_output, row.health_output) for row in rows])
        return [(row.kind, row.hook_state, row.health_state) for row in rows]


def test_a_promoted_models_adapter_is_loaded_asked_and_named(tmp_path: Path) -> None:
    name_file = tmp_path / "name"
    with StandIn(write_answers(tmp_path / "served", dict.fromkeys(PROMPTS, OTHER))) as stand:
        daemon = promote(tmp_path, serve_hook(stand.url, "--adapter-name", str(name_file)), [])
        assert settled(daemon)[-1] == ("promotion", "ok", None)
        assert stand.names_loaded == [name_file.read_text().strip()]


def test_a_server_that_does_not_answer_as_the_champion_did_brings_the_former_one_back(tmp_path: Path) -> None:
    again = f"{sys.executable} -c pass"
    with StandIn(write_answers(tmp_path / "served", dict.fromkeys(PROMPTS, OTHER))) as stand:
        # It was restarted, and serves what it served before.
        daemon = promote(tmp_path, serve_hook(stand.url, "--restart", again), serve_hook(stand.url))
        changes = settled(daemon)
    assert changes[1:] == [("promotion", "failed", "failed"), ("rollback", "ok", None)]
