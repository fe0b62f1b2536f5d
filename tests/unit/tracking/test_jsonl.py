"""metrics.jsonl: whole lines, valid JSON, one uninterrupted run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sltrain_dist.tracking.jsonl import JsonLines


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def strict(text: str) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def steps(path: Path) -> list[int]:
    return [record["step"] for record in strict(path.read_text())]


def write(path: Path, *numbers: int, resumed_step: int = 0) -> None:
    lines = JsonLines(path, resumed_step)
    for number in numbers:
        lines.write({"step": number, "loss": 1.0 / number})
    lines.close()


def test_each_line_is_there_at_once(path: Path) -> None:
    lines = JsonLines(path)
    lines.write({"step": 1, "loss": 2.5, "lr": None})
    assert strict(path.read_text()) == [{"step": 1, "loss": 2.5, "lr": None}]
    lines.write({"step": 2, "loss": 2.25})
    assert steps(path) == [1, 2]
    lines.close()
    lines.close()


def test_floats_survive(path: Path) -> None:
    lines = JsonLines(path)
    lines.write({"step": 1, "loss": 0.1 + 0.2, "lr": 1e-45, "tokens": 2**63})
    assert strict(path.read_text()) == [{"step": 1, "loss": 0.1 + 0.2, "lr": 1e-45, "tokens": 2**63}]


def test_what_is_not_finite_is_valid_json_and_can_be_read_back(path: Path) -> None:
    lines = JsonLines(path)
    lines.write({"step": 1, "a": float("nan"), "b": float("inf"), "c": float("-inf")})
    (record,) = strict(path.read_text())
    assert record == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    assert str(float(record["a"])) == "nan"
    assert (float(record["b"]), float(record["c"])) == (float("inf"), float("-inf"))


def test_resume_drops_later_updates(path: Path) -> None:
    write(path, 10, 20, 30, 40)
    write(path, 30, 40, 50, resumed_step=20)
    assert steps(path) == [10, 20, 30, 40, 50]


def test_resume_reads_as_if_never_interrupted(path: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    write(whole, *range(1, 9))
    write(path, *range(1, 7))
    write(path, *range(5, 9), resumed_step=4)
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "torn", [b'{"step": 15, "lo', b'{"step": 15}', b"\x00\x00\x00", b"\xff\xfe\n", b"12\n", b"{}\n"]
)
def test_a_torn_line_is_dropped(path: Path, torn: bytes) -> None:
    write(path, 10)
    with path.open("ab") as file:
        file.write(torn)
    write(path, 20, resumed_step=18)
    assert steps(path) == [10, 20]


def test_a_new_run_keeps_nothing(path: Path) -> None:
    path.write_text('{"step": 0, "eval_loss": 10.0}\n{"step": 10}\n')
    write(path, 1)
    assert steps(path) == [1]


def test_a_file_with_nothing_to_drop_is_not_rewritten(path: Path) -> None:
    write(path, 10, 20)
    inode = path.stat().st_ino
    write(path, 30, resumed_step=20)
    assert path.stat().st_ino == inode
    assert steps(path) == [10, 20, 30]


def test_a_failed_rewrite_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, 10, 20)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        JsonLines(path, 10)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_rewriting_keeps_the_permissions(path: Path) -> None:
    write(path, 10, 20)
    path.chmod(0o640)
    write(path, resumed_step=10)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_line_that_does_not_fit_leaves_nothing(path: Path) -> None:
    lines = JsonLines(path)
    lines.write({"step": 1})

    class Full:
        """A file on a disk with three bytes left."""

        def __init__(self, file: Any) -> None:
            self.fileno = file.fileno
            self._file = file

        def write(self, data: bytes) -> int:
            return int(self._file.write(data[:3]))

    real = lines._file
    lines._file = Full(real)  # type: ignore[assignment]
    with pytest.raises(OSError, match="disk full"):
        lines.write({"step": 2})
    lines._file = real
    lines.write({"step": 3})
    assert steps(path) == [1, 3]


def test_a_record_needs_its_step(path: Path) -> None:
    with pytest.raises(AssertionError, match="step"):
        JsonLines(path).write({"loss": 1.0})


@pytest.mark.parametrize("how", ["file", "directory", "replaced"])
def test_a_file_that_is_deleted_is_told_of_and_begun_anew(tmp_path: Path, how: str) -> None:
    path, said = tmp_path / "run" / "metrics.jsonl", list[str]()
    lines = JsonLines(path, warn=said.append)
    lines.write({"step": 1})
    if how == "directory":
        shutil.rmtree(path.parent)
    else:
        path.unlink()
    if how == "replaced":
        path.write_text('{"step": 0}\n')
    lines.write({"step": 2})
    lines.write({"step": 3})
    assert said == [f"{path} has been deleted or replaced: its lines before update 2 are lost"]
    assert steps(path) == ([0, 2, 3] if how == "replaced" else [2, 3])
    lines.close()


def test_a_line_that_is_nested_deeply_is_dropped(path: Path) -> None:
    path.write_text('{"step": 10}\n{"step": 11, "x": ' + "[" * 100_000 + "\n")
    write(path, 20, resumed_step=18)
    assert steps(path) == [10, 20]
