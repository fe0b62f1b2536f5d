"""Background processes that read and tokenize.

A worker is a plain child process, connected by one socket: the job goes down, updates come up. It is not
started through `multiprocessing`, which would import the training script again in every worker (and
with it torch), cannot start from a script on standard input, and waits for its children when the parent
ends. When the parent's end of the socket closes, for whatever reason, SIGKILL included, the worker ends.
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
"""Batch systems and terminals send these to all processes of a job; only the trainer answers them."""
_PARENT_CHECK_S = 1.0
_EXIT_WAIT_S = 5.0
_ASK_S = 0.2
_START_S = 60.0
"""More time for a worker's first update: on a busy machine its start takes seconds."""
_PROGRAM = "from sltrain_dist.data.worker import main; main()"


@dataclass(frozen=True)
class Job:
    """What a worker has to do."""

    settings: StreamSettings
    tokenizer_path: Path
    shares: Sequence[StreamShare]
    states: Mapping[int, StreamState]
    prefetch: int
    """Updates to prepare ahead."""


class _Failure(NamedTuple):
    """What a worker sends in place of an update that it cannot make."""

    error: SltrainError | None
    """The error to raise in the parent."""
    traceback: str
    """For any other exception: a mistake of this program."""


class _Death(NamedTuple):
    """What comes last of a worker that has ended without saying why."""


_Message = UpdateRows | _Failure | _Death


class Worker:
    """A running worker, as its parent sees it.

    A thread talks to it, because a worker can be stopped in the middle of a message, and the parent must not wait
    for the rest without an end.

    Args:
        job: What to do.
        timeout_s: Seconds of waiting for an update after which the worker counts as stuck.
    """

    def __init__(self, job: Job, timeout_s: float) -> None:
        self._timeout_s, self._patience_s = timeout_s, timeout_s + _START_S
        self._files = job.settings.files
        self._connection, theirs = Pipe(duplex=True)
        # Blocked signals stay blocked in a child: no moment is left at which one could end the worker.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        self._inbox: queue.Queue[_Message] = queue.Queue(1)
        self._arrived: _Message | None = None
        self._thread = threading.Thread(target=self._receive, args=(job,), daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait(self, asked: Callable[[], object]) -> bool:
        """Waits for the next update, or for what comes in its place.

        Args:
            asked: Looked at a few times a second.

        Returns:
            Whether it has come; false as soon as `asked` is true.

        Raises:
            DataError: Nothing has come for `timeout_s`.
        """
        waited_s = 0.0
        while self._arrived is None:
            if asked():
                return False
            try:
                self._arrived = self._inbox.get(timeout=_ASK_S)
            except queue.Empty:
                waited_s += _ASK_S  # by no clock: those go on while this process is stopped together with its worker
                if waited_s >= self._patience_s:
                    raise self._silence(waited_s) from None
        self._patience_s = self._timeout_s
        return True

    def next_update(self) -> UpdateRows:
        """Waits for the next update.

        Raises:
            DataError: The worker died, or nothing has come for `timeout_s`.
            SltrainError: What the worker raised.
        """
        self.wait(lambda: False)
        message, self._arrived = self._arrived, None
        if isinstance(message, UpdateRows):
            return message
        if not isinstance(message, _Failure):
            raise self._death()
        if message.error is not None:
            raise message.error
        raise RuntimeError(f"a data worker failed:\n{message.traceback}")

    def hang_up(self) -> None:
        """Tells the worker to end."""
        if self._connection.closed:
            return
        with socket.socket(fileno=os.dup(self._connection.fileno())) as end, suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)  # closing alone would not wake a thread that reads
        while self._thread.is_alive():
            with suppress(queue.Empty):
                self._inbox.get(timeout=0.01)
        self._connection.close()

    def join(self) -> None:
        """Waits for its end, which :meth:`hang_up` has asked for."""
        try:
            self._process.wait(_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self, job: Job) -> None:
        """The thread: sends the job, and takes one update ahead of the one that waits in the inbox."""
        message: _Message = _Death()
        try:
            self._connection.send(job)
            while isinstance(message := self._connection.recv(), UpdateRows):
                self._inbox.put(message)
        except (EOFError, OSError):
            message = _Death()
        self._inbox.put(message)

    def _death(self) -> DataError:
        self.hang_up()
        self.join()
        code = self._process.returncode
        if code == -signal.SIGBUS:  # the way in which a mapped file ends that was cut short
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

    def _silence(self, waited_s: float) -> DataError:
        return DataError(
            f"the data worker with process id {self.pid} has sent nothing for {waited_s:.0f} s (parallel.timeout_s): "
            f"it {_activity(self.pid)}. Start the same command again to go on from the newest checkpoint; if reading "
            "takes this long, set a larger parallel.timeout_s"
        )


def _activity(pid: int) -> str:
    """What a process is doing, in the kernel's words."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "has ended"
    if state in "Tt":
        return f"is stopped by a signal or a debugger (kill -CONT {pid} would let it go on)"
    return "is waiting for a disk or a file system" if state == "D" else "is still running, or waiting for its data"


def _environment() -> dict[str, str]:
    """The parent's module path, and no threads for linear algebra, of which a worker does none."""
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def main() -> None:
    """The worker's program: `sys.argv` holds the number of its socket and the parent's process id."""
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
    """Makes updates until that fails."""
    try:
        group = StreamGroup(job.settings, Tokenizer(job.tokenizer_path), job.shares, job.states)
        while True:
            outbox.put(group.next_update())
    except SltrainError as error:
        return _Failure(error, "")
    except Exception:
        return _Failure(None, traceback.format_exc())


def _send(connection: Connection, outbox: queue.Queue[UpdateRows | _Failure]) -> None:
    """Sends what the outbox holds, in a thread of its own, so that updates are prepared ahead."""
    while True:
        message = outbox.get()
        try:
            connection.send(message)
        except OSError:
            os._exit(0)
        if isinstance(message, _Failure):
            return


def _end_with_parent(connection: Connection, parent: int) -> None:
    """Ends the process, wherever its other threads are, when the parent hangs up or is gone.

    The process id is looked at as well, because a fork of the parent's may hold its end of the socket open.
    """
    try:
        while not connection.poll(_PARENT_CHECK_S):
            if os.getppid() != parent:
                break
    except OSError:
        pass
    os._exit(0)
