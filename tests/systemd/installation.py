"""Puts the checkout, its environment's packages and its interpreter where README.md's installation puts them."""

import sys
import sysconfig
from pathlib import Path

from tests.systemd.boot import Machine

ROOT = Path(__file__).parents[2]
SOURCE = "/opt/dropforge-source"
PACKAGES = "/opt/dropforge-packages"
PYTHON = "/opt/dropforge-python"
_SCRIPT = """#!/opt/dropforge/bin/python3
import sys
from daemon.cli import main
sys.exit(main())
"""


def binds() -> dict[Path, str]:
    """
    Return what the machine must be booted with.

    The interpreter is bound too, because one below a home folder, as pyenv's, is closed to a service's user.
    """
    folders = {ROOT: SOURCE, Path(sysconfig.get_path("purelib")): PACKAGES}
    return folders if sys.base_prefix == "/usr" else {**folders, Path(sys.base_prefix): PYTHON}


def make_environment(machine: Machine) -> None:
    """Make /opt/dropforge as `python3 -m venv` and `pip install` would, with the packages bound instead of copied."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    home = "/usr/bin" if sys.base_prefix == "/usr" else f"{PYTHON}/bin"
    folder = machine.root / "opt" / "dropforge"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python3").symlink_to(f"{home}/{version}")
    if home != "/usr/bin":  # its shared library was built to be looked for where it really lies
        machine.write("/etc/ld.so.conf.d/00-dropforge-python.conf", f"{PYTHON}/lib\n")
        machine.run("ldconfig")
    machine.write("/opt/dropforge/pyvenv.cfg", f"home = {home}\ninclude-system-site-packages = false\n")
    machine.write(f"/opt/dropforge/lib/{version}/site-packages/here.pth", f"{PACKAGES}\n{SOURCE}\n")
    machine.write("/opt/dropforge/bin/dropforge", _SCRIPT, 0o755)
