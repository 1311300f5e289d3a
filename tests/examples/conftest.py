"""The examples as a user has them, beside novels that are short, and tiny models that have learned a little of one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOVEL = 60_000  # characters of each


class Workshop:
    """A copy of examples/ in which a user works."""

    def __init__(self, folder):
        self.folder = folder
        shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        novels = folder / "benchmarks" / "data"
        novels.mkdir(parents=True)
        for novel in (ROOT / "benchmarks" / "data").glob("*.txt"):
            (novels / novel.name).write_text(novel.read_text(encoding="utf-8")[:NOVEL], encoding="utf-8")
        self.environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TQDM_DISABLE"), "1"),
            **{"COLUMNS": "120", "PYTHONIOENCODING": "utf-8", "TMPDIR": str(folder), "TOKENIZERS_PARALLELISM": "false"},
        }

    def run(self, example, *arguments, launcher=(), **environment):
        """What it prints, if it ends well."""
        done = subprocess.run(
            [sys.executable, *launcher, f"examples/{example}", *map(str, arguments)],
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            encoding="utf-8",
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def tiny_models(workshop):
    """The folder of each tiny model, by its kind; and what was said while they were made."""
    said = workshop.run("tiny_models.py", "models", "--steps", "100")
    return {kind: workshop.folder / "models" / kind for kind in ("llama", "moe", "bert")} | {"said": said}
