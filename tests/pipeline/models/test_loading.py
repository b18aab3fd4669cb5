"""Memory that is given back, and weight files that are not as their headers say."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CannotTrain
from pipeline.models import generation, loading
from pipeline.models.manifest import check_base


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
    text = json.dumps(header).encode()
    (base / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    check_base(base)
    with pytest.raises(CannotTrain, match="cannot be loaded: SafetensorError") as raised:
        loading.load_model(base, "cpu")
    assert raised.value.hint
