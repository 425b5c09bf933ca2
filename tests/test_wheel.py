"""The wheel: everything is in it, and it works in a folder that is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dsalign import __version__, assets
from dsalign.config import ds_files

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "dsalign", "kernels", "ds_configs")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q")


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed; nothing of this process's Python settings reaches it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that what setuptools leaves in a checkout is neither used nor written."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), str(source), cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that it was installed into."""
    folder = tmp_path_factory.mktemp("installed")
    run(*PIP, "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel), cwd=folder)
    return folder


def test_everything_is_in_it(wheel: Path) -> None:
    """Every module, DeepSpeed file and demo row, and nothing that is not ours to install."""
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "dsalign").rglob("*.py")}
    expected |= {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels/dsalign_kernels").rglob("*.py")}
    expected |= {f"dsalign/ds_configs/{name}.json" for name in ds_files.names()}
    expected |= {f"dsalign/assets/{assets.find(name).name}" for name in assets.names()} | {"dsalign/assets/README.md"}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "dsalign/assets/report").iterdir()}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected
    assert wheel.name == f"dsalign-{__version__}-py3-none-any.whl"


def test_runs_in_another_folder(installed: Path, tmp_path: Path) -> None:
    """`--deepspeed zero2` is found in what was installed; the configuration shows it."""
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    flags = ("--algo", "dpo", "--model", "m", "--dataset", "d.jsonl", "--deepspeed", "zero2", "--print_config")
    shown = run(sys.executable, "-m", "dsalign.cli", *flags, cwd=tmp_path, PYTHONPATH=str(installed))
    assert "deepspeed: zero2" in shown and "# flag --deepspeed" in shown
    shown = run(
        sys.executable, "-m", "dsalign.cli", "--algo", "dpo", "--print_config", cwd=tmp_path, PYTHONPATH=str(installed)
    )
    assert "dataset: ['demo:pairs']" in shown
    code = (
        "import dsalign_kernels; from dsalign import assets; from dsalign.config import ds_files; "
        "print(ds_files.find('zero2'), dsalign_kernels.__file__, assets.find('demo:pairs'))"
    )
    where = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert where[0] == str(installed / "dsalign" / "ds_configs" / "zero2.json")
    assert where[1].startswith(str(installed))
    assert where[2] == str(installed / "dsalign" / "assets" / "pairs.jsonl")


def test_console_command(installed: Path, tmp_path: Path) -> None:
    """`dsalign` is the same program."""
    shown = run(str(installed / "bin" / "dsalign"), "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert shown == f"dsalign {__version__}\n"
