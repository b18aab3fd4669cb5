"""Memory that is given back or bounded, and weight files that are not as their headers say."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CannotTrain
from pipeline.models import generation, loading
from pipeline.models.manifest import check_base
from tests.model_folder import write_header


@pytest.mark.parametrize("own", [None, "7"])
def test_code_is_kept_of_few_shapes_unless_the_user_says_otherwise(own: str | None) -> None:
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {names[0]: own} if own else {}
    # Torch may read them when it is imported.
    code = f"""
import os, sys

class Finder:
    def find_spec(self, module, *_):
        if module == "torch":
            print(*(os.environ.get(name) for name in {names}))

sys.meta_path.insert(0, Finder())
import pipeline.train.step
import torch
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [own or "128", "128"]


def test_a_closed_model_has_no_weights_in_memory(tiny_llama: Path) -> None:
    asked = generation.open_model(tiny_llama, generation.load_template(tiny_llama, "chat"), "cpu")
    generation.close_model(asked)
    assert {str(weight.device) for weight in asked.model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("dtype", lambda _: "Z8"),
        ("shape", lambda _: [1 << 40]),
        ("data_offsets", lambda offsets: [place - 4 for place in offsets]),
        ("data_offsets", lambda offsets: [place + 4 for place in offsets]),
    ],
    ids=["unknown dtype", "larger than its bytes", "overlap", "gap"],
)
def test_weights_that_only_their_own_reader_tells_to_be_damaged_are_refused_as_they_are_loaded(
    tiny_llama: Path, tmp_path: Path, field: str, change: Any
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    data = (base / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    tensor = header["model.layers.0.input_layernorm.weight"]
    tensor[field] = change(tensor[field])
    write_header(base, header, data[8 + length :])
    check_base(base)
    with pytest.raises(CannotTrain, match="cannot be loaded: SafetensorError") as raised:
        loading.load_model(base, "cpu")
    assert raised.value.hint
