"""Shared by all tests: where the project is, where its commands are, and a throw-away copy of its sources."""
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent  # the commands of this environment, also where it is not activated
SOURCES = ["settings.ini", "setup.py", "pyproject.toml", "README.md", "nbs", "fedmpqkd"]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported; child processes inherit it


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    "A copy of the notebooks and of the package, without caches."
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_proc", "_docs", ".last_checked")
    target = tmp_path / "copy"
    target.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir(): shutil.copytree(source, target / name, ignore=skip)
        elif source.exists(): shutil.copy(source, target / name)
    return target
