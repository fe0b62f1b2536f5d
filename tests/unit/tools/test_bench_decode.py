"""tools/bench_decode.py at the smallest size: every form of every support, as a table and as JSON."""

from __future__ import annotations

import json
import sys

import pytest

from sltrain_dist.config import presets
from tests.support.paths import REPO
from tests.unit.tools.test_bench_linear import TINY

sys.path.insert(0, str(REPO / "tools"))

import bench_decode


def test_all_forms_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = TINY["model"] | {"vocab_size": 64, "num_layers": 6, "num_kv_heads": 1}
    monkeypatch.setitem(presets.PRESETS, "llama_60m", TINY | {"model": model})
    arguments = "--preset 60m --dtype fp32 --batch 2 --prompt-tokens 8 --new-tokens 3 --repeats 1 --methods"
    monkeypatch.setattr(sys, "argv", ["bench_decode.py", *arguments.split(), ",".join(bench_decode.METHODS), "--json"])
    bench_decode.main()
    report = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in report["methods"]}
    assert list(rows) == list(bench_decode.METHODS)
    assert (report["layers"], report["all_layers"]) == (2, 6)
    linears = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48  # q, o; k, v; gate, up, down
    ends = 2 * 64 * 32 + 32 + 2 * 17 * 16  # embedding, head, last norm, rotary tables of 8 + 3 · 3 positions
    assert rows["dense"]["weights_bytes"] == 4 * (ends + 2 * (linears + 2 * 32))
    assert rows["dense"]["all_weights_bytes"] == 4 * (ends + 6 * (linears + 2 * 32))
    for method, row in rows.items():
        assert row["cache_bytes"] == 2 * 2 * 2 * 16 * 17 * 4  # k and v, layers, prompts, width, slots, bytes
        assert row["decode_tokens_per_s"] > 0 and row["prefill_tokens_per_s"] > 0 and row["decode_peak_bytes"] > 0
        if method.endswith("merged"):
            assert row["weights_bytes"] == rows["dense"]["weights_bytes"]
        elif method != "dense":
            assert row["weights_bytes"] < rows["dense"]["weights_bytes"]
    assert rows["dense"]["decode_speedup"] == 1

    monkeypatch.setattr(sys, "argv", ["bench_decode.py", *arguments.split(), "blocks factored"])
    bench_decode.main()
    out = capsys.readouterr().out
    assert out.startswith("60m, 2 of 6 layers, fp32, 2 × 8 tokens") and "| blocks factored |" in out
