"""What a run took: seconds, tokens, memory and money, and what a point that it gained."""

from pathlib import Path

from daemon.state.run_files import ArtifactDamaged, load_verdict, run_folder
from pipeline.report.cost import run_cost
from pipeline.report.facts import RunCost


def cost_of(state_folder: Path, run_id: int) -> RunCost | None:
    """Return what a run took, and what a point that it gained; `None` if no result of its attempts can be read."""
    try:
        verdict = load_verdict(state_folder, run_id)
    except (OSError, ArtifactDamaged):
        verdict = None
    try:
        cost = run_cost(run_folder(state_folder, run_id), verdict.gain if verdict else None)
    except OSError:
        return None
    return cost if cost.seconds else None
