"""Hub datasets through `datasets` itself, from a stand-in for the Hub on loopback that drops connections."""

import gzip
import json
import os
import subprocess
import sys

from tests.support.hub_server import COMMIT, serve_hub

CARD = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
"""
PROGRAM = """
import json, sys
from sltrain_dist.data.sources.retry import Fetcher, RetryPolicy
from sltrain_dist.data.sources.resolve import read_documents, resolve_source
from sltrain_dist.errors import DataError
waits, lines = [], []
fetcher = Fetcher(RetryPolicy(retries=3), sleep=waits.append, jitter=lambda: 0.5, report=lines.append)
try:
    shards = resolve_source("allenai/c4", subset="en", fetcher=fetcher)
    texts = [json.loads(line)["text"] for shard in shards for _, line in read_documents(shard, "text", fetcher=fetcher)]
    found = {"shards": shards, "texts": texts}
except DataError as error:
    found = {"error": str(error)}
print(json.dumps({**found, "waits": waits, "lines": lines}))
"""


def ask(hub, directory):
    """In a process of its own: the Hub's address is read when its library is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(directory)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=240, check=True
    )
    return json.loads(done.stdout)


def test_listing_and_reading_survive_dropped_connections(tmp_path):
    texts = [f"document {number}" for number in range(20)]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    with serve_hub() as hub:
        hub.files = {"README.md": CARD, "en/c4-validation.00000-of-00001.json.gz": b"not asked for"}
        for number in range(2):
            half = b"".join(lines[10 * number : 10 * number + 10])
            hub.files[f"en/c4-train.{number:05d}-of-00002.json.gz"] = gzip.compress(half)
        hub.drop = ["HEAD /datasets/allenai/c4/resolve/main/README.md", f"/tree/{COMMIT}/en", "c4-train.00001"]
        found = ask(hub, tmp_path)
        assert hub.drop == [], "not every fault happened"
    assert found["shards"] == [
        f"hf://datasets/allenai/c4@{COMMIT}/en/c4-train.{number:05d}-of-00002.json.gz" for number in range(2)
    ]
    assert found["texts"] == texts
    assert 1 <= len(found["waits"]) <= 3  # the Hub's own library has mended the others
    assert found["lines"][0].startswith("the Hub's allenai/c4: connection, ")
    assert found["lines"][0].endswith("; retry 1 of 3 in 1 s")


def test_a_hub_that_is_gone_is_given_up(tmp_path):
    with serve_hub() as hub:
        hub.drop_all = True
        found = ask(hub, tmp_path)
        assert found["waits"] == [1, 2, 4]
        assert "'allenai/c4' is not a local file" in found["error"]
        assert "gave up after 4 attempts; last error: connection" in found["error"]
        assert "check its name, data.subset, the network, HF_HUB_OFFLINE" in found["error"]
