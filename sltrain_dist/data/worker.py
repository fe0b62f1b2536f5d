"""Background processes that read and tokenize.

A worker is a plain child process, connected by one socket: the parent sends the job, the worker sends
updates. `multiprocessing` is not used: it would import the training script (and with it torch) again in
every worker, cannot start from a script on standard input, and waits for its children when the parent
ends. When the parent's end of the socket closes, for any reason, SIGKILL included, the worker ends.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from sltrain_dist.data.order import StreamShare
from sltrain_dist.data.sources.identity import check_unchanged
from sltrain_dist.data.stream.stream_group import StreamGroup, UpdateRows
from sltrain_dist.data.stream.virtual_stream import StreamSettings, StreamState
from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.errors import DataError, SltrainError

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Batch systems and terminals send these to all processes of a job; only the trainer reacts to them."""
_PARENT_CHECK_S = 1.0
_EXIT_WAIT_S = 5.0
_POLL_S = 0.2
_STARTUP_S = 60.0
"""Extra time for a worker's first update: on a busy machine its start takes seconds."""
_PROGRAM = "from sltrain_dist.data.worker import main; main()"


@dataclass(frozen=True)
class Job:
    """Work of one worker: the streams it reads, and from where."""

    settings: StreamSettings
    tokenizer_path: Path
    shares: Sequence[StreamShare]
    states: Mapping[int, StreamState]
    prefetch: int
    """Updates to prepare ahead."""


class _Failure(NamedTuple):
    """Message of a worker that cannot make its next update."""

    error: SltrainError | None
    """The error to raise in the parent; None for any other exception, which is a bug in this program."""
    traceback: str
    """Traceback of the other exception, or empty."""


class _Death(NamedTuple):
    """Stands for the message of a worker that has ended without sending one."""


_Message = UpdateRows | _Failure | _Death


class Worker:
    """The parent's handle of a running worker.

    A thread reads from the worker: a worker can be stopped in the middle of a message, and the parent must not wait
    forever for the rest.

    Args:
        job: The work.
        timeout_s: Seconds to wait for an update before the worker counts as stuck.
    """

    def __init__(self, job: Job, timeout_s: float) -> None:
        self._timeout_s, self._current_timeout_s = timeout_s, timeout_s + _STARTUP_S
        self._files = job.settings.files
        self._connection, worker_end = Pipe(duplex=True)
        # A child inherits blocked signals, so none can end the worker before it ignores them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(worker_end.fileno()), str(os.getpid())],
                pass_fds=[worker_end.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        worker_end.close()
        self._inbox: queue.Queue[_Message] = queue.Queue(1)
        self._arrived: _Message | None = None
        self._thread = threading.Thread(target=self._receive, args=(job,), daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    def wait(self, should_stop: Callable[[], object]) -> bool:
        """Waits until :meth:`next_update` can return or raise at once.

        Args:
            should_stop: Called a few times a second; a true result ends the waiting.

        Returns:
            Whether a message has arrived.

        Raises:
            DataError: The worker has sent nothing for `timeout_s`.
        """
        waited_s = 0.0
        while self._arrived is None:
            if should_stop():
                return False
            try:
                self._arrived = self._inbox.get(timeout=_POLL_S)
            except queue.Empty:
                waited_s += _POLL_S  # not a clock: it would run on while this process and its worker are both stopped
                if waited_s >= self._current_timeout_s:
                    raise self._stuck_error(waited_s) from None
        self._current_timeout_s = self._timeout_s
        return True

    def next_update(self) -> UpdateRows:
        """Waits for the next update.

        Raises:
            DataError: The worker died, or has sent nothing for `timeout_s`.
            SltrainError: The worker raised it.
        """
        self.wait(lambda: False)
        message, self._arrived = self._arrived, None
        if isinstance(message, UpdateRows):
            return message
        if not isinstance(message, _Failure):
            raise self._death_error()
        if message.error is not None:
            raise message.error
        raise RuntimeError(f"a data worker failed:\n{message.traceback}")

    def hang_up(self) -> None:
        """Makes the worker end, by closing the connection."""
        if self._connection.closed:
            return
        with socket.socket(fileno=os.dup(self._connection.fileno())) as end, suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)  # close() alone would not wake the reading thread
        while self._thread.is_alive():
            with suppress(queue.Empty):
                self._inbox.get(timeout=0.01)
        self._connection.close()

    def join(self) -> None:
        """Waits for the worker to end after :meth:`hang_up`, and kills it if that takes too long."""
        try:
            self._process.wait(_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self, job: Job) -> None:
        """Runs in the thread: sends the job, then receives messages, one beyond the one in the inbox."""
        message: _Message = _Death()
        try:
            self._connection.send(job)
            while isinstance(message := self._connection.recv(), UpdateRows):
                self._inbox.put(message)
        except (EOFError, OSError):
            message = _Death()
        self._inbox.put(message)

    def _death_error(self) -> DataError:
        self.hang_up()
        self.join()
        code = self._process.returncode
        if code == -signal.SIGBUS:  # reading a mapped file that was truncated raises SIGBUS
            try:
                for path, expected in self._files.items():
                    check_unchanged(path, expected)
            except DataError as error:
                return error
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        return DataError(
            f"the data worker with process id {self.pid} {how}; its output is above. If the machine ran out of memory, "
            "lower data.shuffle_block, data.prefetch or data.workers"
        )

    def _stuck_error(self, waited_s: float) -> DataError:
        return DataError(
            f"the data worker with process id {self.pid} has sent nothing for {waited_s:.0f} s (parallel.timeout_s): "
            f"it {_activity(self.pid)}. Start the same command again to resume from the newest checkpoint; if reading "
            "takes this long, set a larger parallel.timeout_s"
        )


def _activity(pid: int) -> str:
    """Describes what a process is doing, from its state in /proc."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "has ended"
    if state in "Tt":
        return f"is stopped by a signal or a debugger (kill -CONT {pid} resumes it)"
    return "is waiting for a disk or a file system" if state == "D" else "is still running, or waiting for its data"


def _environment() -> dict[str, str]:
    """Returns the worker's environment: the parent's module path, and no BLAS threads, which it would not use."""
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def main() -> None:
    """Runs the worker; `sys.argv` holds the file descriptor of its socket and the parent's process id."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    try:
        job: Job = connection.recv()
    except (EOFError, OSError):
        return
    parent = int(sys.argv[2])
    threading.Thread(target=_end_with_parent, args=(connection, parent), daemon=True).start()
    outbox: queue.Queue[UpdateRows | _Failure] = queue.Queue(job.prefetch)
    sender = threading.Thread(target=_send, args=(connection, outbox))
    sender.start()
    outbox.put(_produce(job, outbox))
    sender.join()


def _produce(job: Job, outbox: queue.Queue[UpdateRows | _Failure]) -> _Failure:
    """Makes updates until one fails; returns the failure."""
    try:
        group = StreamGroup(job.settings, Tokenizer(job.tokenizer_path), job.shares, job.states)
        while True:
            outbox.put(group.next_update())
    except SltrainError as error:
        return _Failure(error, "")
    except Exception:
        return _Failure(None, traceback.format_exc())


def _send(connection: Connection, outbox: queue.Queue[UpdateRows | _Failure]) -> None:
    """Runs in a thread: sends the messages in the outbox, while further updates are prepared."""
    while True:
        message = outbox.get()
        try:
            connection.send(message)
        except OSError:
            os._exit(0)
        if isinstance(message, _Failure):
            return


def _end_with_parent(connection: Connection, parent: int) -> None:
    """Ends the process, whatever its other threads are doing, when the parent hangs up or is gone.

    The parent's process id is checked too: a fork of the parent may keep its end of the socket open.
    """
    try:
        while not connection.poll(_PARENT_CHECK_S):
            if os.getppid() != parent:
                break
    except OSError:
        pass
    os._exit(0)
