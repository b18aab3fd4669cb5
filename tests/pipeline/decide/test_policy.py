"""A threshold of the gate has one address, which names the rows of the bench that show what it does."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from pipeline.artifacts import Preview
from pipeline.decide import policy

#: Not thresholds: a unit, and what makes the simulation, the bootstrap and sums of floats exact.
OTHERS = {"POINTS", "RESAMPLES", "_BLOCK", "_EQUAL", "1e-12", "_FAIR", "_STEPS", "0.001"}
#: The fair coin of McNemar's test and of exchanged answers.
COIN = "0.5"


MODULES = {path.stem: path for path in Path(policy.__file__).parent.glob("[!_]*.py") if path.stem != "policy"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_but_the_policy_has_a_number_of_its_own(name: str) -> None:
    tree, values = ast.parse(MODULES[name].read_text()), vars(importlib.import_module(f"pipeline.decide.{name}"))
    assigned = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    named = {target.id for target in assigned if isinstance(target, ast.Name)}
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    fractions = {str(value) for value in constants if isinstance(value, float) and value % 1}
    assert {name for name in named if isinstance(values[name], int | float)} | fractions <= {*OTHERS, COIN}


def test_each_row_that_the_policy_quotes_is_printed_by_the_bench() -> None:
    source = Path(policy.__file__).read_text().replace("\n#:", "")
    rows = [row for found in re.findall(r'Rows? "([^"]*)"(?: and "([^"]*)")?', source) for row in found if row]
    bench = (Path(__file__).parents[3] / "bench" / "gate.py").read_text()
    assert len(rows) > 5
    assert [row for row in rows if row not in bench] == []


@pytest.mark.parametrize(
    ("points", "records", "usual", "expected"),
    [
        (39.9, 30, 80.0, True),
        (40.0, 100, 80.0, False),
        (0.0, 29, 80.0, False),
        (0.0, 100, None, False),
        (0.0, 100, 0.0, False),
        (None, 0, 80.0, False),
    ],
)
def test_a_drop_is_far_below_its_sisters_under_half_of_their_score(
    points: float | None, records: int, usual: float | None, *, expected: bool
) -> None:
    preview = Preview(records=records, points=points, metric="exact_match", usual=usual)
    assert policy.is_far_below(preview) == expected
