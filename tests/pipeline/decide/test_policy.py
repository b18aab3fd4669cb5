"""A threshold of the gate has one address, which names the rows of the bench that show what it does."""

import ast
import importlib
import re
from pathlib import Path

import pytest

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
