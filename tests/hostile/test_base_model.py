"""A base model from an enemy: `init`, `doctor` and `status` say what is wrong with it, and it holds up nobody else."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.models.untrusted import ENDED_BY
from tests.pipeline.models.test_manifest import pipe, set_in

#: Seconds after which a command that should be refused at once hangs.
PATIENCE = 120
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}
Spoil = Callable[[Path], object]


def run(*arguments: str, folder: Path | None = None, said: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments, in a folder, with something said on its standard input."""
    argv = [sys.executable, "-P", *arguments]
    return subprocess.run(
        argv, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=PATIENCE, input=said
    )


def weights(data: bytes) -> Spoil:
    return lambda folder: (folder / "model.safetensors").write_bytes(data)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def escaping(folder: Path) -> None:
    index = {"weight_map": {"a": "../../x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


#: What is wrong, how it is made, and what is said of it.
EVIL: dict[str, tuple[Spoil, str]] = {
    "a vocabulary of 0": (set_in("config.json", vocab_size=0), "vocab_size is 0"),
    "a width of -96": (set_in("config.json", hidden_size=-96), "hidden_size is -96"),
    "10^12 layers": (set_in("config.json", num_hidden_layers=10**12), "num_hidden_layers is 1000000000000"),
    "a pipe as config.json": (pipe("config.json"), "holds config.json, which is not a regular file"),
    "a pipe as tokenizer.json": (pipe("tokenizer.json"), "holds tokenizer.json, which is not a regular file"),
    "a link to a file of the user": (
        lambda folder: (folder / "vocab.txt").symlink_to("/etc/hostname"),
        "holds vocab.txt, a link out of the folder",
    ),
    "a chat template of 10 MB": (
        lambda folder: (folder / "chat_template.jinja").write_text("x" * 10_000_000),
        "chat_template.jinja of 10,000,000 bytes",
    ),
    "a header of 2^60 bytes": (weights(struct.pack("<Q", 1 << 60) + b"{}"), "shorter than its header"),
    "an index out of the folder": (escaping, "lacks the shard ../../x.safetensors"),
    "pickled weights": (pickled, "only pickled ones"),
    "half a surrogate pair": (
        set_in("tokenizer_config.json", additional_special_tokens=["\ud800x"]),
        "a special token with half a surrogate pair",
    ),
    "code of its own": (set_in("config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"}), "auto_map"),
    "config.json 200,000 deep": (lambda folder: (folder / "config.json").write_text("[" * 200_000), "no readable"),
}


def added_tokens(*tokens: str, more: int = 0) -> Spoil:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        listed = [{"id": number, "content": token, "special": True} for number, token in enumerate(tokens)]
        content["added_tokens"] = [*listed, *[{}] * more]
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return spoil


def empty_tensors(count: int) -> Spoil:
    header = {str(n): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(count)}
    text = json.dumps(header, separators=(",", ":")).encode()
    return weights(struct.pack("<Q", len(text)) + text)


#: What costs memory or minutes to read, and what is said of it.
COSTLY: dict[str, tuple[Spoil, str]] = {
    "chained special tokens": (added_tokens(*("a" * n for n in range(1, 2000))), "has 2,001 special tokens of"),
    "very many special tokens": (added_tokens(*map(str, range(100_000))), "added tokens are no JSON of at most"),
    "20,000 special tokens": (added_tokens(*map(str, range(20_000))), "and 16,384 of 262,144 characters"),
    "added tokens of 60 MB": (added_tokens(more=15_000_000), "added tokens are no JSON of at most 4,194,304 bytes"),
    "added tokens of 120 MB": (added_tokens(more=30_000_000), "tokenizer.json of 12"),
    "half a million empty tensors": (empty_tensors(500_000), "it has 500,000 tensors, and the limit is 100,000"),
    "a wide config.json": (lambda folder: (folder / "config.json").write_text("[" + "[]," * 1_000_000), "no readable"),
}
_LOOK = """
import re, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
from pipeline.errors import CannotTrain
from pipeline.models.manifest import check_base
from pipeline.models.tokenizer_files import special_tokens, token_pattern
try:
    check_base(Path(sys.argv[1]))
except CannotTrain as error:
    print(error.message)
re.compile(token_pattern(special_tokens(Path(sys.argv[1]))))
"""


@pytest.mark.parametrize("what", COSTLY)
def test_what_is_costly_to_read_is_refused_within_little_memory(what: str, tiny_llama: Path, tmp_path: Path) -> None:
    spoil, words = COSTLY[what]
    base = spoilt(tiny_llama, tmp_path / "base", spoil)
    done = run("-c", _LOOK, str(base))
    assert (done.returncode, done.stderr) == (0, ""), done
    assert words in done.stdout, done


def spoilt(base: Path, folder: Path, spoil: Spoil) -> Path:
    made = Path(shutil.copytree(base, folder))
    spoil(made)
    return made


def test_init_and_doctor_name_it(tiny_llama: Path, tmp_path: Path) -> None:
    bases = {f"track{number}": what for number, what in enumerate(EVIL)}
    settings = f'base_model = "{tiny_llama}"\n'
    for track, what in bases.items():
        base = spoilt(tiny_llama, tmp_path / track, EVIL[what][0])
        settings += f'[tracks.{track}]\nbase_model = "{base}"\n'
    (tmp_path / "dropforge.toml").write_text(settings)
    found = json.loads(run("-m", "daemon", "doctor", "--json", folder=tmp_path).stdout)["findings"]
    for track, what in bases.items():
        (line,) = [one for one in found if one["name"] == f"base of {track}"]
        words = EVIL[what][1]
        assert (line["level"], words in line["text"], bool(line["remedy"])) == ("bad", True, True), line
    begun = run("-m", "daemon", "init", "place", "--base-model", str(tmp_path / "track0"), folder=tmp_path)
    assert (begun.returncode, (tmp_path / "place").exists()) == (65, False), begun
    assert EVIL[bases["track0"]][1] in " ".join(begun.stderr.split())
    assert "Traceback" not in begun.stderr


_LOAD = """
import sys
from pathlib import Path
from pipeline.errors import DropforgeError
from pipeline.models.generation import arithmetic, load_template, named_ends, open_model
from pipeline.models.loading import load_tokenizer
folder = Path(sys.argv[1])
for use in (
    lambda: load_tokenizer(folder), lambda: named_ends(folder),
    lambda: arithmetic(folder, "cpu"), lambda: open_model(folder, load_template(folder, "auto"), "cpu"),
):
    try:
        use()
    except (DropforgeError, ValueError, OSError) as error:
        print(f"refused: {error}"[:200])
"""


@pytest.mark.parametrize("known", [True, False], ids=["known architecture", "own architecture"])
def test_its_code_is_never_run_even_where_nobody_checks(known: bool, tiny_llama: Path, tmp_path: Path) -> None:
    decoy = tmp_path / "decoy"
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    code = f"open({str(decoy)!r}, 'w').close()\nclass X: pass\n"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "custom_generate/generate.py"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(code)
    auto = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    set_in("config.json", auto_map=auto, **({} if known else {"model_type": "x"}))(base)
    set_in("tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]})(base)
    done = run("-c", _LOAD, str(base), said="y\n" * 20)
    assert (done.returncode, decoy.exists()) == (0, False), done
    assert ("refused" in done.stdout) != known, "where transformers has the architecture itself, it takes its own"


#: Makes a template of each of these chat templates.
_ASK = """
import sys
from pathlib import Path
from pipeline.errors import CannotTrain
from pipeline.models import untrusted
from pipeline.models.template import Template
from pipeline.models.loading import load_tokenizer
tokenizer = load_tokenizer(Path(sys.argv[1]))
untrusted.SECONDS = 1.0
print("loaded", flush=True)
for tokenizer.chat_template in sys.argv[2:]:
    try:
        Template(tokenizer, "chat", [])
    except CannotTrain as error:
        print(error.message)
"""


_ENDLESS = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a number that never lets go": "{{ 7 ** (7 ** 12) }}",
}


@pytest.mark.parametrize("what", _ENDLESS)
def test_a_chat_template_without_end_ends_its_step(what: str, tiny_llama: Path) -> None:
    done = run("-c", _ASK, str(tiny_llama), _ENDLESS[what])
    assert (done.returncode, done.stdout) == (-ENDED_BY, "loaded\n"), done


def test_a_chat_template_that_takes_all_memory_is_refused(tiny_llama: Path) -> None:
    templates = ("{{ 'a' * (8 * 1024**3) }}", "{{ '%1000000000d' % 1 }}", "{{ 'a'|center(2000000000) }}")
    done = run("-c", _ASK, str(tiny_llama), *templates)
    words = "cannot render a request: ValueError: it needs more than 536,870,912 bytes of memory"
    assert [words in line for line in done.stdout.splitlines()[1:]] == [True] * 3, done
