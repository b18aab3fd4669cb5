"""What an evaluation would have recorded of two models, for a run whose steps were scripted."""

import json
from typing import Any

from pipeline import durable
from pipeline.evaluate.inference import Result
from pipeline.evaluate.scoring import score_answers, write_records
from pipeline.models.generation import Answer, Likelihood
from pipeline.records.heldout import HeldoutRecord
from tests.chaos.house import Daemon


def record(
    daemon: Daemon, candidate: list[str], champion: list[str], turns: tuple[tuple[str, str], ...] = (), **more: Any
) -> tuple[str, str]:
    """Write what the run's evaluation would have recorded of both models; return their ids."""
    path = daemon.root / "runs" / "1" / "evaluate.json"
    evaluation = json.loads(path.read_text())
    made = durable.read_object(daemon.root / "runs" / "1" / "merge.json")["model_id"]
    evaluation["candidate"]["model_id"] = made
    evaluation |= {"folder": f"{evaluation['folder']}/report", **more}
    path.write_text(json.dumps(evaluation))
    asked = [
        HeldoutRecord(
            id=f"{place:04}",
            instruction="say",
            input=f"word {place}",
            output="x",
            references=("x",),
            drop=1,
            pinned=False,
            tags=(),
            near=(),
            group=f"{place:04}",
            turns=turns,
        )
        for place in range(len(candidate))
    ]
    answers = [[Answer(text, 3, ended=True) for text in texts] for texts in (candidate, champion)]
    results = [Result(said, [Likelihood(1.0, 1)] * len(said), 0, 0.0, []) for said in answers]
    lines = [score_answers(asked, result, "exact_match") for result in results]
    folder = daemon.root / evaluation["folder"]
    folder.mkdir()
    write_records(folder / "records.jsonl", asked, *lines)
    return made, evaluation["champion"]["model_id"]
