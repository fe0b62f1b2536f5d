"""Standard output in encodings that lack our characters: every entry prints, and none fails."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sltrain_dist.streams import replace_unprintable
from tests.support.paths import REPO

PLAN = ["-m", "sltrain_dist", "plan", "--config", "configs/llama_60m.yaml", "--device-memory", "RTX 4090"]
LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""A locale whose encoding is ASCII, as far as Python lets it be."""


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    known = {key: value for key, value in os.environ.items() if not key.startswith("PYTHONIO")}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, check=False, cwd=REPO, env={**known, **environment}
    )


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"}, LOCALE])
def test_plan(environment: dict[str, str]) -> None:
    result = run(PLAN, environment)
    assert result.returncode == 0, result.stderr
    assert b"low-rank factors" in result.stdout and b"llama_60m, sltrain r=128 ?=0.03" in result.stdout


@pytest.mark.parametrize("arguments", [["launch/pretrain.py", "--help"], ["-m", "sltrain_dist", "plan", "--help"]])
def test_help(arguments: list[str]) -> None:
    result = run(arguments, {"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0, result.stderr
    assert b"--config" in result.stdout


def test_errors() -> None:
    result = run(["launch/pretrain.py", "--config", "none-→.yaml"], {"PYTHONIOENCODING": "latin-1"})
    assert result.returncode == 2 and result.stderr.startswith(b"error: none-?.yaml: cannot read")


def test_what_is_put_in_the_place_of_standard_output_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    text, narrow = io.StringIO(), io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", text)
    monkeypatch.setattr(sys, "stderr", narrow)
    replace_unprintable()
    print("→", file=sys.stdout)
    print("é → δ", file=sys.stderr, flush=True)
    assert text.getvalue() == "→\n" and narrow.buffer.getvalue() == "é ? ?\n".encode("latin-1")  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", sorted(REPO.glob("tools/*.py")), ids=lambda path: path.stem)
def test_every_tool_begins_with_it(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    ascii_only = path.stem == "gpu_environment"  # prints JSON alone
    for main in mains if not ascii_only else ():
        first = main.body[1 if ast.get_docstring(main) else 0]
        assert ast.unparse(first) == "replace_unprintable()"


def test_no_file_is_opened_in_the_encoding_of_the_locale() -> None:
    """Text that may hold any character names its encoding; JSON is ASCII, and so are the system's own files."""
    script = """
import sys, tempfile, pathlib
from sltrain_dist.config.load import load_config, to_yaml
from sltrain_dist.errors import ConfigError
from sltrain_dist.streams import replace_unprintable
from sltrain_dist.tracking.console import Console
path, letter = pathlib.Path(tempfile.mkdtemp()), chr(0x3b4)
(path / "x.yaml").write_bytes(f"tracking: {{run_name: {letter}}}\\ntrain: {{steps: 1}}\\n".encode())
assert f"run_name: {letter}" in to_yaml(load_config(path / "x.yaml"))
try:
    load_config(path / "x.yaml", [f"run_dir={letter}"])
except ConfigError as error:
    assert "has characters that file names cannot have in ascii; set PYTHONUTF8=1" in str(error)
else:
    raise AssertionError("such a directory cannot be made")
replace_unprintable()
console = Console(path / "log.txt", "lines", total=None)
console.note(f"1 {letter} 2")
console.close()
assert f"1 {letter} 2".encode() in (path / "log.txt").read_bytes()
"""
    result = run(["-c", script], LOCALE)
    assert result.returncode == 0, result.stderr
    assert b"1 ? 2" in result.stdout
