"""The console: formats, plain lines, the bar, and the log file."""

from __future__ import annotations

import io
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from sltrain_dist.tracking.console import Console, Screen, format_bytes, format_count, format_duration

STAMP = "2026-01-02 03:04:05"
RECORD = {
    "step": 120,
    "loss": 5.1234,
    "lr": 3e-3,
    "grad_norm": 0.8712,
    "tokens": 1_200_000,
    "tokens_per_s": 18_345.6,
    "mfu": 0.4123,
}
EVALUATION = {"step": 200, "eval_loss": 5.01, "eval_perplexity": 1149.94, "eval_tokens": 123_456}
LINE = "step 120/2000  loss 5.123  lr 3.0e-03  grad 0.871  18.3k tok/s  MFU 41.2 %  ETA 12:31"
SECTIONS = {"Parameters": [("low-rank", "5.03M"), ("all", "12M")], "Output": [("run_dir", "runs/[x]")]}


def console(tmp_path: Path, *, terminal: bool, mode: Any = "auto", **more: Any) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    screen = Screen(file=text, force_terminal=terminal, width=100, color_system=None, _environ={"TERM": "xterm"})
    more = {"total": 2000} | more
    made = Console(tmp_path / "log.txt", mode, screen=screen, now=lambda: datetime.fromisoformat(STAMP), **more)
    return made, text


def log(tmp_path: Path) -> list[str]:
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert all(line.startswith(f"{STAMP}  ") for line in lines)
    return [line.removeprefix(f"{STAMP}  ") for line in lines]


class TestPlainLines:
    def test_training(self, tmp_path: Path) -> None:
        made, text = console(tmp_path, terminal=False)
        made.progress(119, 0, 5.0, None)
        made.train(RECORD, 751.0)
        assert text.getvalue() == f"{STAMP}  {LINE}\n"
        assert log(tmp_path) == [LINE]

    def test_what_is_unknown_is_left_out(self, tmp_path: Path) -> None:
        made, text = console(tmp_path, terminal=False)
        made.train({"step": 1, "loss": 5.0, "lr": 1e-4, "grad_norm": None, "tokens_per_s": 900, "mfu": None}, None)
        assert text.getvalue() == f"{STAMP}  step 1/2000  loss 5.000  lr 1.0e-04  900 tok/s\n"

    def test_not_finite(self, tmp_path: Path) -> None:
        made, text = console(tmp_path, terminal=False)
        made.train({"step": 1, "loss": float("nan"), "grad_norm": float("inf")}, None)
        made.evaluation({"step": 1, "eval_loss": float("nan"), "eval_perplexity": float("inf"), "eval_tokens": 7})
        assert "loss nan  grad inf" in text.getvalue()
        assert "eval loss nan  perplexity inf  (7 tokens)" in text.getvalue()

    def test_by_tokens(self, tmp_path: Path) -> None:
        made, text = console(tmp_path, terminal=False, total=10_000_000, unit="tokens")
        made.train(RECORD, 60.0)
        assert text.getvalue().startswith(f"{STAMP}  step 120  1.20M/10.0M tokens  loss 5.123  ")

    def test_everything_else(self, tmp_path: Path) -> None:
        made, text = console(tmp_path, terminal=False)
        made.summary(SECTIONS)
        made.evaluation(EVALUATION)
        made.note("resumed after step 100" + " and more" * 30)  # long lines are not broken
        made.warn("two\nlines [bold]")
        expected = [
            "Parameters",
            "  low-rank  5.03M",
            "  all       12M",
            "Output",
            "  run_dir   runs/[x]",
            "step 200  eval loss 5.010  perplexity 1,149.9  (123,456 tokens)",
            "resumed after step 100" + " and more" * 30,
            "warning: two",
            "lines [bold]",
        ]
        assert log(tmp_path) == expected
        assert text.getvalue() == "".join(f"{STAMP}  {line}\n" for line in expected)

    def test_lines_on_a_terminal(self, tmp_path: Path) -> None:
        made, text = console(tmp_path, terminal=True, mode="lines")
        made.train(RECORD, 751.0)
        assert text.getvalue() == f"{STAMP}  {LINE}\n"

    def test_a_bar_without_a_terminal_is_refused_aloud(self, tmp_path: Path) -> None:
        made, text = console(tmp_path, terminal=False, mode="bar")
        made.train(RECORD, 751.0)
        assert "tracking.progress=bar needs a terminal; printing lines" in text.getvalue()
        assert LINE in text.getvalue()
        assert "\x1b" not in text.getvalue()


class TestBar:
    def test_shows_all_that_matters_and_the_log_gets_lines(self, tmp_path: Path) -> None:
        made, text = console(tmp_path, terminal=True)
        made.summary(SECTIONS)
        made.train(RECORD, 751.0)
        made.progress(121, 1_210_000, 5.5, 750.0)
        made.evaluation(EVALUATION)
        made.warn("careful")
        made.close()
        shown = text.getvalue()
        assert "step 121/2000  loss 5.500  18.3k tok/s  MFU 41.2 %  lr 3.0e-03  ETA 12:30" in shown
        assert "low-rank  5.03M" in shown
        assert "runs/[x]" in shown
        assert "step 200  eval loss 5.010  perplexity 1,149.9  (123,456 tokens)" in shown
        assert "warning: careful" in shown
        assert STAMP not in shown
        assert LINE in log(tmp_path)
        assert "step 200  eval loss 5.010  perplexity 1,149.9  (123,456 tokens)" in log(tmp_path)
        assert "warning: careful" in log(tmp_path)
        assert not any("121" in line for line in log(tmp_path))

    def test_fits_into_80_columns(self, tmp_path: Path) -> None:
        text = io.StringIO()
        screen = Screen(file=text, force_terminal=True, width=80, color_system=None, _environ={"TERM": "xterm"})
        made = Console(tmp_path / "log.txt", "bar", total=140_000, screen=screen)
        made.train(RECORD | {"step": 139_990}, 3600.0)
        made.close()
        assert "step 139990/140000  loss 5.123  18.3k tok/s  MFU 41.2 %  lr 3.0e-03" in text.getvalue()

    def test_close_gives_the_cursor_back(self, tmp_path: Path) -> None:
        made, text = console(tmp_path, terminal=True)
        made.progress(1, 10, 5.0, None)
        made.close()
        made.close()
        shown = text.getvalue()
        assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0

    def test_no_bar_on_a_dumb_terminal(self, tmp_path: Path) -> None:
        text = io.StringIO()
        screen = Screen(file=text, force_terminal=True, _environ={"TERM": "dumb"})
        Console(tmp_path / "log.txt", "auto", total=2000, screen=screen).train(RECORD, 751.0)
        assert text.getvalue().endswith(f"{LINE}\n")


class TestTrouble:
    def test_log_is_appended(self, tmp_path: Path) -> None:
        for message in ("first", "second"):
            made, _ = console(tmp_path, terminal=False)
            made.note(message)
            made.close()
        assert log(tmp_path) == ["first", "second"]

    @pytest.mark.parametrize("terminal", [False, True])
    def test_reader_gone(self, tmp_path: Path, terminal: bool) -> None:
        made, text = console(tmp_path, terminal=terminal)

        def gone(_: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

        text.write = gone  # type: ignore[method-assign, assignment]
        made.summary(SECTIONS)
        made.train(RECORD, 751.0)
        made.progress(121, 0, 5.0, None)
        made.note("still here")
        made.close()
        assert [line for line in log(tmp_path) if "cannot write to standard output any more" in line] == [
            "warning: cannot write to standard output any more: [Errno 32] Broken pipe"
        ]
        assert {LINE, "still here"} <= set(log(tmp_path))

    def test_log_on_a_full_disk(self, tmp_path: Path) -> None:
        (tmp_path / "log.txt").symlink_to("/dev/full")
        made, text = console(tmp_path, terminal=False)
        made.note("one")
        made.note("two")
        made.close()
        assert [line.removeprefix(f"{STAMP}  ") for line in text.getvalue().splitlines()] == [
            "one",
            "warning: log.txt ends here: [Errno 28] No space left on device",
            "two",
        ]


class TestFormats:
    @pytest.mark.parametrize(
        ("value", "binary", "decimal"),
        [
            (0, "0 B", "0 B"),
            (999, "999 B", "999 B"),
            (1000, "1000 B", "1.00 kB"),
            (1024, "1.00 KiB", "1.02 kB"),
            (1536 * 2**20, "1.50 GiB", "1.61 GB"),
            (10**9, "954 MiB", "1.00 GB"),
            (2**30 - 1, "1.00 GiB", "1.07 GB"),
            (24 * 2**30, "24.0 GiB", "25.8 GB"),
            (139 * 2**30, "139 GiB", "149 GB"),
            (-(2**31), "-2.00 GiB", "-2.15 GB"),
        ],
    )
    def test_bytes(self, value: int, binary: str, decimal: str) -> None:
        assert format_bytes(value) == binary
        assert format_bytes(value, decimal=True) == decimal

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (0, "0"),
            (512, "512"),
            (3.25, "3.25"),
            (45.67, "45.7"),
            (999.6, "1.00k"),
            (18_345.6, "18.3k"),
            (99_960, "100k"),
            (999_600, "1.00M"),
            (5_030_000, "5.03M"),
            (1.339e9, "1.34B"),
            (2e12, "2.00T"),
            (2e16, "20000T"),
            (float("inf"), "inf"),
        ],
    )
    def test_count(self, value: float, expected: str) -> None:
        assert format_count(value) == expected

    @pytest.mark.parametrize(
        ("seconds", "expected"),
        [
            (0, "0:00"),
            (7.4, "0:07"),
            (59.6, "1:00"),
            (751, "12:31"),
            (3599.7, "1:00:00"),
            (3723, "1:02:03"),
            (2 * 86_400 + 11_045, "2d 03:04:05"),
            (float("inf"), "?"),
            (float("nan"), "?"),
        ],
    )
    def test_duration(self, seconds: float, expected: str) -> None:
        assert format_duration(seconds) == expected
