"""The least that counts as a model folder, for tests that load no model, and what spoils one."""

import json
import struct
from pathlib import Path

from pipeline.models.manifest import model_id, write_manifest


def write_model(folder: Path, weights: bytes) -> str:
    """Make the least that counts as a model folder; return its id."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    tensor = {"dtype": "U8", "shape": [len(weights)], "data_offsets": [0, len(weights)]}
    write_header(folder, {"weights": tensor}, weights)
    write_manifest(folder)
    return model_id(folder)


def write_header(folder: Path, header: object, data: bytes = b"") -> None:
    """Write weights with this header, whatever it says."""
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def flip(path: Path) -> None:
    """Change the last bit of a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
