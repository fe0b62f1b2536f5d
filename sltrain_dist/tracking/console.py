"""Console output: a summary, then a progress bar or plain lines, and the same lines in run_dir/log.txt."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from sltrain_dist.files import has_its_name, make_directory

if TYPE_CHECKING:
    from rich.progress import Progress

Value = float | int | str | None

Sections = Mapping[str, Sequence[tuple[str, str]]]
"""Rows of (name, value) by title."""


class Screen(RichConsole):
    """Rich's console, except that it does not end the process when the reader of its output is gone."""

    def on_broken_pipe(self) -> None:
        """Re-raises the error, which :class:`Console` handles."""
        raise  # rich calls this in its handler of the BrokenPipeError


class Console:
    """The terminal (or whatever standard output is) and the log file.

    On a terminal, training lines update a live bar, and everything else is printed above it. Elsewhere all
    lines are printed plainly, with a time. The plain lines are always appended to the log file.

    Args:
        log_path: The log file. Its directory must exist.
        mode: Value of `tracking.progress`.
        total: Length of the run, in `unit`; None if unknown.
        unit: Unit of `total`.
        screen: Console to print to; None: standard output.
        now: Returns the time of day, for the lines.

    Raises:
        OSError: The log file cannot be opened.
    """

    def __init__(
        self,
        log_path: Path,
        mode: Literal["auto", "bar", "lines"],
        *,
        total: int | None,
        unit: Literal["steps", "tokens"] = "steps",
        screen: Screen | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._screen = screen or Screen()
        self._now = now
        self._total, self._unit = total, unit
        self._log_path = log_path
        self._log: TextIO | None = _open_log(log_path)
        self._bar: Progress | None = None
        self._details: dict[str, Value] = {}
        self._screen_is_gone = False
        # Elsewhere than on a terminal, a bar would fill the output with control characters.
        self._live = mode != "lines" and self._screen.is_terminal and not self._screen.is_dumb_terminal
        if mode == "bar" and not self._live:
            self.note("tracking.progress=bar needs a terminal; printing lines")

    def summary(self, sections: Sections) -> None:
        """Prints a summary of the run, as one table, and as plain lines to the log file."""
        width = max((len(name) for rows in sections.values() for name, _ in rows), default=0)
        for title, rows in sections.items():
            self._write([title, *(f"  {name:<{width}}  {value}" for name, value in rows)], echo=not self._live)
        if self._live:
            table = Table(box=None, show_header=False, pad_edge=False)
            table.add_column(no_wrap=True)
            table.add_column(overflow="fold")
            for title, rows in sections.items():
                table.add_row(Text(title, "bold"))
                for name, value in rows:
                    table.add_row(Text(f"  {name}"), Text(value))
            self._show(lambda: self._screen.print(table))

    def note(self, message: str) -> None:
        """Prints information for the user."""
        self._print(message)

    def warn(self, message: str) -> None:
        """Prints a warning."""
        self._print(f"warning: {message}", "yellow")

    def progress(self, step: int, tokens: int, loss: float, eta_s: float | None) -> None:
        """Updates the bar, if there is one."""
        self._details["loss"] = loss
        self._move_bar(step, tokens, eta_s)

    def train(self, record: Mapping[str, Value], eta_s: float | None) -> None:
        """Prints a training line; on a terminal it updates the bar, and only the log file gets the line."""
        step, tokens = record["step"], record.get("tokens") or 0
        assert isinstance(step, int) and isinstance(tokens, int)
        self._write([self._training_line(step, tokens, _details(record, _LINE), eta_s)], echo=not self._live)
        self._details = dict(record)
        self._move_bar(step, tokens, eta_s)

    def evaluation(self, record: Mapping[str, Value]) -> None:
        """Prints an evaluation line."""
        self._print(
            f"step {record['step']}  eval loss {_number(record.get('eval_loss'), '.3f')}"
            f"  perplexity {_number(record.get('eval_perplexity'), ',.1f')}"
            f"  ({_number(record.get('eval_tokens'), ',')} tokens)",
            "bold",
        )

    def sync(self) -> None:
        """Waits until the log file is on disk."""
        if self._log is not None:
            with suppress(OSError):  # the next line reports it
                os.fsync(self._log.fileno())

    def close(self) -> None:
        """Stops the bar, restores the cursor, and closes the log file. May be called twice."""
        if self._bar is not None:
            self._show(self._bar.stop)
            self._bar = None
        self._live = False
        self._close_log()

    def _move_bar(self, step: int, tokens: int, eta_s: float | None) -> None:
        if self._live:
            self._show(lambda: self._update_bar(step, tokens, eta_s))

    def _update_bar(self, step: int, tokens: int, eta_s: float | None) -> None:
        if self._bar is None:
            from rich.progress import BarColumn, Progress, TextColumn  # slow, and not needed to format numbers

            columns = (BarColumn(bar_width=10), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=self._screen, refresh_per_second=4)
            self._bar.add_task("", total=self._total)
            self._bar.start()
        line = self._training_line(step, tokens, _details(self._details, _BAR), eta_s)
        self._bar.update(self._bar.task_ids[0], completed=tokens if self._unit == "tokens" else step, description=line)

    def _training_line(self, step: int, tokens: int, details: Sequence[str], eta_s: float | None) -> str:
        eta = () if eta_s is None else (f"ETA {format_duration(eta_s)}",)
        return "  ".join((self._position(step, tokens), *details, *eta))

    def _position(self, step: int, tokens: int) -> str:
        if self._total is None:
            return f"step {step}"
        if self._unit == "steps":
            return f"step {step}/{self._total}"
        return f"step {step}  {format_count(tokens)}/{format_count(self._total)} tokens"

    def _print(self, message: str, style: str = "") -> None:
        self._write([message], echo=not self._live)
        if self._live:
            self._show(lambda: self._screen.print(Text(message, style), soft_wrap=True))

    def _write(self, lines: Sequence[str], *, echo: bool) -> None:
        stamp = self._now().strftime(_STAMP)
        text = "".join(f"{stamp}  {line}\n" for message in lines for line in message.split("\n"))
        if echo:
            # Bypasses rich, which would wrap lines at 80 columns when there is no terminal to measure.
            self._show(lambda: (self._screen.file.write(text), self._screen.file.flush()))
        if self._log is not None:
            try:
                if not has_its_name(self._log, self._log_path):
                    self._log.close()
                    self._log = _open_log(self._log_path)
                self._log.write(text)
            except OSError as error:
                self._close_log()
                self.warn(f"log.txt ends here: {error}")

    def _show(self, write: Callable[[], object]) -> None:
        """Writes to standard output, unless its reader (`| head`, a closed ssh session) is gone."""
        if self._screen_is_gone:
            return
        try:
            write()
        except OSError as error:
            self._screen_is_gone, self._live = True, False
            self.warn(f"cannot write to standard output any more: {error}")

    def _close_log(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            with suppress(OSError):  # closing flushes again what a full disk refused
                log.close()


def _open_log(path: Path) -> TextIO:
    make_directory(path.parent)
    return path.open("a", encoding="utf-8", buffering=1)


def log_line(path: Path, message: str) -> None:
    """Appends a line to a log file before a :class:`Console` opens it."""
    with suppress(OSError), _open_log(path) as log:  # the console of the following run reports it
        log.write(f"{datetime.now():{_STAMP}}  {message}\n")


_STAMP = "%Y-%m-%d %H:%M:%S"
_LINE = ("loss", "lr", "grad_norm", "tokens_per_s", "mfu")
_BAR = ("loss", "tokens_per_s", "mfu", "lr")  # must fit into 80 columns


def _details(record: Mapping[str, Value], keys: Sequence[str]) -> list[str]:
    """Formats the known values of `keys`, each with its label or unit."""
    formats: dict[str, Callable[[float], str]] = {
        "loss": lambda value: f"loss {value:.3f}",
        "lr": lambda value: f"lr {value:.1e}",
        "grad_norm": lambda value: f"grad {value:.3g}",
        "tokens_per_s": lambda value: f"{format_count(value)} tok/s",
        "mfu": lambda value: f"MFU {100 * value:.1f} %",
    }
    known = {key: record.get(key) for key in keys}
    return [formats[key](value) for key, value in known.items() if isinstance(value, int | float)]


def _number(value: Value, spec: str) -> str:
    return "?" if value is None or isinstance(value, str) else format(value, spec)


def format_bytes(num_bytes: float, *, decimal: bool = False) -> str:
    """Formats bytes with three significant digits: "1.50 GiB" (2^30), or with `decimal` "1.61 GB" (10^9)."""
    units = ("B", "kB", "MB", "GB", "TB", "PB") if decimal else ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    return _scaled(num_bytes, 1000 if decimal else 1024, units, " ")


def format_count(count: float) -> str:
    """Formats a count with three significant digits: "512", "18.3k", "5.03M", "1.34B", "2.00T"."""
    return _scaled(count, 1000, ("", "k", "M", "B", "T"), "")


def _scaled(value: float, base: int, units: Sequence[str], space: str) -> str:
    if not math.isfinite(value):
        return f"{value}{space}{units[0]}"
    sign, value, power = "-" if value < 0 else "", abs(value), 0
    # The unit is chosen for the rounded number: 999.6k becomes 1.00M.
    while power < len(units) - 1 and value >= base - 0.5:
        value, power = value / base, power + 1
    whole = value >= 99.95 or (power == 0 and value == int(value))
    digits = 0 if whole else 1 if value >= 9.995 else 2
    return f"{sign}{value:.{digits}f}{space}{units[power]}"


def format_duration(seconds: float) -> str:
    """Formats seconds as "0:07", "12:31", "1:02:03" or "2d 03:04:05"; "?" if not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
