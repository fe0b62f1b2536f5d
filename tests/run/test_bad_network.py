"""Whole runs on shards behind a server: mended faults change nothing, a lost shard ends the run with code 3."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fault_server import cut, serve, status
from tests.support.runs import Corpus, metrics, outcome, train_here, trajectory


def sources(url: str, names: list[str]) -> str:
    return "data.source=[" + ", ".join(f"{url}/{name}" for name in names) + "]"


def test_a_bad_network_and_a_lost_shard(corpus: Corpus, tiny: Path, tmp_path: Path, finished: Path) -> None:
    shards = sorted(Path(corpus.train).parent.glob(Path(corpus.train).name))
    patience = ["data.retry_wait_s=0.01", "data.workers=1", "data.timeout_s=20.0", "data.retries=3"]
    with serve() as server:
        server.files |= {shard.name: shard.read_bytes() for shard in shards}
        names = sorted(server.files)
        for name in names:
            server.plan[name] = [status(500), cut(0.5), status(429, Retry_After="0")]
        assert train_here(tiny, tmp_path / "mended", sources(server.url, names), *patience) == 0
        assert trajectory(tmp_path / "mended") == trajectory(finished)
        last = [line for line in metrics(tmp_path / "mended") if "loss" in line][-1]
        assert {key for key in last if key.startswith("data_retries_")} == {
            "data_retries_server_error",
            "data_retries_truncated",
            "data_retries_rate_limit",
        }

        del server.files[names[1]]
        assert train_here(tiny, tmp_path / "lost", sources(server.url, names), *patience, "train.steps=100") == 3
        assert outcome(tmp_path / "lost")["code"] == 3
        assert f"{server.url}/{names[1]}" in outcome(tmp_path / "lost")["reason"]


def test_sources_with_weights(corpus: Corpus, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = [str(shard) for shard in sorted(Path(corpus.train).parent.glob(Path(corpus.train).name))]
    two = f"data.source=[{shards[0]}, {shards[1]}]"
    assert train_here(tiny, tmp_path / "run", two, "data.weights=[3.0, 1.0]") == 0
    assert train_here(tiny, tmp_path / "coarse", two, "data.weights=[9.0, 1.0]") == 2
    assert "data.streams" in capsys.readouterr().err
    assert (
        train_here(tiny, tmp_path / "twice", f"data.source=[{shards[0]}, {corpus.train}]", "data.weights=[1.0, 1.0]")
        == 2
    )
    assert "two entries of data.source" in capsys.readouterr().err
