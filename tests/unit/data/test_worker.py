"""Worker processes: the same rows as without, errors that arrive, and no process left behind."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from sltrain_dist.data.loader import TrainLoader
from sltrain_dist.data.tokenizer import train_tokenizer
from sltrain_dist.errors import DataError
from tests.support.data import data_config, write_shard


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    texts = [f"document number {number} of a small corpus, with words" for number in range(200)]
    train_tokenizer(texts, path, vocab_size=290)
    return path


@pytest.fixture
def shards(tmp_path):
    return [
        write_shard(tmp_path / f"{i}.json.gz", [f"document {i} number {j} " * (j % 7 + 1) for j in range(60)])
        for i in range(3)
    ]


def make_loader(shards, tokenizer, *, workers, rank=0, world_size=1, timeout_s=math.inf, **changes):
    return TrainLoader(
        data_config(**{"streams": 5, "workers": workers, "batching": "pack", "seq_len": 16, **changes}),
        shards=shards,
        tokenizer_path=tokenizer,
        seed=0,
        global_batch=12,
        rank=rank,
        world_size=world_size,
        timeout_s=timeout_s,
    )


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids, seconds=10.0):
    end = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(is_running, pids))


@pytest.mark.slow
def test_same_rows_and_states_for_any_number_of_workers(shards, tokenizer):
    def read(workers, rank, world_size):
        with closing(make_loader(shards, tokenizer, workers=workers, rank=rank, world_size=world_size)) as loader:
            rows = np.stack([next(loader) for _ in range(20)])
            return rows, loader.state_dict(), loader.stats.documents, loader.stats.bad

    expected = read(0, 0, 1)
    for workers in (2, 9):
        rows, *rest = read(workers, 0, 1)
        assert np.array_equal(rows, expected[0])
        assert rest == list(expected[1:])
    last, *_ = read(1, 1, 2)
    assert np.array_equal(last, expected[0][:, 6:])


def test_workers_import_nothing_heavy(shards, tokenizer):
    heavy = {"torch", "datasets", "mlflow", "sltrain_dist.config.schema"}
    code = f"import sys, sltrain_dist.data.worker; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with closing(make_loader(shards, tokenizer, workers=1)) as loader:
        next(loader)
        maps = Path(f"/proc/{loader.worker_pids[0]}/maps").read_text()
    assert "numpy" in maps
    assert "torch" not in maps


def test_errors_come_over_with_their_type_and_place(shards, tokenizer, tmp_path):
    content = (tmp_path / "1.json.gz").read_bytes()
    (tmp_path / "1.json.gz").write_bytes(content[:-20])
    outcomes = []
    for workers in (0, 2):
        with closing(make_loader(shards, tokenizer, workers=workers)) as loader:
            updates = 0
            with pytest.raises(DataError, match=r"1\.json\.gz after \d+ lines: EOFError") as error:
                for _ in range(100):
                    next(loader)
                    updates += 1
            outcomes.append((updates, str(error.value), loader.state_dict()))
    assert outcomes[0] == outcomes[1]


@pytest.mark.slow
def test_mistakes_of_ours_come_over_with_their_traceback(tmp_path, tokenizer, monkeypatch):
    shard = write_shard(tmp_path / "x.jsonl", ["text"] * 30)
    with closing(make_loader([shard], tokenizer, workers=1, shuffle_block=4)) as loader:
        next(loader)
    from sltrain_dist.data import worker

    monkeypatch.setattr(
        worker, "_PROGRAM", "from sltrain_dist.data import worker; worker.StreamGroup = None; worker.main()"
    )
    with (
        closing(make_loader([shard], tokenizer, workers=1)) as loader,
        pytest.raises(RuntimeError, match=r"(?s)a data worker failed.*TypeError: 'NoneType'"),
    ):
        next(loader)


def test_a_killed_worker_is_an_error_at_once(shards, tokenizer):
    with closing(make_loader(shards, tokenizer, workers=2)) as loader:
        next(loader)
        pid = loader.worker_pids[1]
        os.kill(pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(DataError, match=rf"process id {pid} was killed by signal 9 \(SIGKILL\)"):
            for _ in range(100_000):  # those that were sent before are good
                next(loader)
        assert time.monotonic() - start < 5


def test_a_mapped_file_that_was_cut_short_is_named(shards, tokenizer):
    """Reading beyond its end kills the worker."""
    with closing(make_loader(shards, tokenizer, workers=1)) as loader:
        next(loader)
        os.kill(loader.worker_pids[0], signal.SIGSTOP)
        os.truncate(shards[1], 20)
        os.kill(loader.worker_pids[0], signal.SIGBUS)
        os.kill(loader.worker_pids[0], signal.SIGCONT)
        with pytest.raises(DataError, match=r"1\.json\.gz has changed since the run began: 20 bytes"):
            for _ in range(100_000):
                next(loader)


@pytest.fixture
def frozen(shards, tokenizer):
    """A loader that counts its worker as stuck after half a second, and it is stopped."""
    # Messages longer than a socket's buffer: the worker is stopped in the middle of one. No second worker: on a busy
    # machine that may send nothing for half a second either.
    with closing(make_loader(shards, tokenizer, workers=1, timeout_s=0.5, seq_len=40_000)) as loader:
        next(loader)
        (pid,) = loader.worker_pids
        os.kill(pid, signal.SIGSTOP)
        while loader.wait(lambda: False) and loader._failure is None:
            next(loader)  # what has come over already
        yield loader, pid


@pytest.mark.slow
def test_a_frozen_worker_is_an_error(frozen):
    loader, pid = frozen
    with pytest.raises(DataError, match=rf"process id {pid} has sent nothing for .* stopped by a signal .*-CONT {pid}"):
        next(loader)
    loader.close()
    assert not is_running(pid)


@pytest.mark.slow
def test_waiting_for_a_frozen_worker_ends_when_asked_to_stop(shards, tokenizer):
    """Nothing is lost by that: the rows come when the worker goes on."""
    with (
        closing(make_loader(shards, tokenizer, workers=2)) as loader,
        closing(make_loader(shards, tokenizer, workers=0)) as expected,
    ):
        pid = loader.worker_pids[1]
        os.kill(pid, signal.SIGSTOP)
        while loader.wait(iter([False, False, True]).__next__):
            assert np.array_equal(next(loader), next(expected))
        assert loader.state_dict() == expected.state_dict()
        os.kill(pid, signal.SIGCONT)
        for _ in range(20):
            assert np.array_equal(next(loader), next(expected))


def test_a_worker_that_cannot_start_is_an_error(shards, tokenizer, monkeypatch, capfd):
    from sltrain_dist.data import worker

    monkeypatch.setattr(worker, "_PROGRAM", "raise SystemExit(7)")
    with (
        pytest.raises(DataError, match="ended with code 7"),
        closing(make_loader(shards, tokenizer, workers=1)) as loader,
    ):
        next(loader)


def test_signals_to_the_whole_job_leave_workers_alone(shards, tokenizer):
    asked = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    with closing(make_loader(shards, tokenizer, workers=1)) as loader:
        (pid,) = loader.worker_pids
        for number in asked:
            os.kill(pid, number)  # at once, before its program has begun
        expected = next(loader)
        for number in asked:
            os.kill(pid, number)
        for _ in range(200):
            next(loader)
        assert is_running(pid)
        assert expected.shape == (12, 17)


def test_close_ends_the_workers(shards, tokenizer):
    loader = make_loader(shards, tokenizer, workers=2)
    pids = loader.worker_pids
    next(loader)
    start = time.monotonic()
    loader.close()
    loader.close()
    assert not any(map(is_running, pids))
    assert time.monotonic() - start < 4
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


PARENT = """
import json, os, sys, time
from pathlib import Path
from sltrain_dist.config.schema import DataConfig
from sltrain_dist.data.loader import TrainLoader
loader = TrainLoader(DataConfig(workers=2, seq_len=16, shuffle_block=4), shards=json.loads(sys.argv[1]),
    tokenizer_path=Path(sys.argv[2]), seed=0, global_batch=12, rank=0, world_size=1)
next(loader)
if FORKS and os.fork() == 0:
    time.sleep(15)
    os._exit(0)
print(json.dumps(loader.worker_pids), flush=True)
ENDING
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "forks", "sign"),
    [
        ("time.sleep(60)", False, signal.SIGKILL),
        # A fork keeps the parent's end of the sockets open; the parent's death must be noticed all the same.
        ("time.sleep(60)", True, signal.SIGKILL),
        ("raise SystemExit(0)", False, None),
        ("raise RuntimeError('the trainer fails without closing its loader')", False, None),
    ],
)
def test_workers_die_with_their_parent(shards, tokenizer, ending, forks, sign):
    """The parent's program comes by standard input, which a `multiprocessing` child could not start from."""
    parent = subprocess.Popen(
        [sys.executable, "-", json.dumps(shards), str(tokenizer)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with parent:
        parent.stdin.write(PARENT.replace("FORKS", str(forks)).replace("ENDING", ending))
        parent.stdin.close()
        pids = json.loads(parent.stdout.readline())
        if sign is not None:
            assert all(map(is_running, pids))
            parent.send_signal(sign)
        parent.wait(10)
        assert wait_until_gone(pids, 5)


def test_prefetch_is_bounded(tmp_path, tokenizer):
    """A worker that nobody takes rows from stops reading."""
    shard = write_shard(tmp_path / "x.jsonl", ["some words of a document"] * 5000)
    with closing(make_loader([shard], tokenizer, workers=1, seq_len=4096, streams=1, prefetch=2)) as loader:
        next(loader)
        (pid,) = loader.worker_pids

        def cpu_ticks():
            return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))

        end = time.monotonic() + 10
        before = cpu_ticks()
        while time.monotonic() < end:
            time.sleep(0.4)
            if cpu_ticks() == before:
                return
            before = cpu_ticks()
    pytest.fail("the worker goes on without end")
