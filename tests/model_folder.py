"""The least that counts as a model folder, for tests that load no model."""

import json
from pathlib import Path

from pipeline.models.manifest import model_id, write_manifest


def write_model(folder: Path, weights: bytes) -> str:
    """Make the least that counts as a model folder; return its id."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    tensor = {"dtype": "U8", "shape": [len(weights)], "data_offsets": [0, len(weights)]}
    header = json.dumps({"weights": tensor}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weights)
    write_manifest(folder)
    return model_id(folder)
