"""The paper's arithmetic (its Table 2) and the emulation of its code (its Figure 3)."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.plan.paper.accounting import METHODS, paper_memory, paper_table
from sltrain_dist.plan.paper.reference import reference_estimate

PRINTED = {
    # The 60M cells that the paper prints; the others follow from its formulas, by hand.
    ("llama_60m", "full"): "0.35",
    ("llama_60m", "galore"): "0.28",
    ("llama_60m", "sltrain"): "0.26",
    ("llama_60m", "lowrank"): "0.26",
    ("llama_60m", "relora"): "0.37",
    ("llama_130m", "full"): "0.81",
    ("llama_130m", "galore"): "0.61",
    ("llama_130m", "sltrain"): "0.60",
    ("llama_1b", "full"): "8.04",
    ("llama_1b", "lowrank"): "3.66",
    ("llama_1b", "sltrain"): "4.16",
    ("llama_7b", "relora"): "30.40",
    ("llama_7b", "sltrain"): "21.46",
}


@pytest.mark.parametrize(("preset", "method"), list(PRINTED))
def test_table_2(preset: str, method: Any) -> None:
    config = build_config({"preset": preset})
    assert str(paper_memory(config.model, config.reparam, method).total_gb) == PRINTED[preset, method]


def test_table_2_by_hand() -> None:
    """h = 512, f = 1376, 8 layers, vocabulary 32,000, r = 128, density 0.03: the numbers of llama_60m."""
    base = 2 * 32_000 * 512 + 17 * 512
    square, wide = 512 * 512, 512 * 1376
    low_rank = 8 * 128 * (4 * 1024 + 3 * 1888)
    sparse = 8 * (4 * int(0.03 * square) + 3 * int(0.03 * wide))
    full = base + 8 * (4 * square + 3 * wide)
    expected = {
        "full": (2 * full, 4 * full),
        "lowrank": (2 * (base + low_rank), 4 * (base + low_rank)),
        "relora": (2 * (full + base + low_rank), 4 * (base + low_rank)),
        "galore": (2 * full, 4 * (base + 8 * 128 * (4 * 512 + 3 * 1376)) + 2 * 8 * 128 * 7 * 512),
        "sltrain": (10 * sparse + 2 * (base + low_rank), 4 * (base + low_rank + sparse)),
    }
    config = build_config({"preset": "llama_60m", "reparam": {"support": "blocks"}})  # the support does not matter
    table = paper_table(config.model, config.reparam)
    assert {each.method: (each.parameter_bytes, each.optimizer_bytes) for each in table} == expected
    assert tuple(each.method for each in table) == METHODS
    for each in table:
        assert each.total_gb == each.parameter_gb + each.optimizer_gb


def seven_b(method: str, bits: int, update: str, **more: Any) -> Config:
    train = {"micro_batch": 1, "global_batch": 1}
    return build_config(
        {
            "preset": "llama_7b",
            "reparam": {"method": method},
            "optim": {"state_bits": bits, "update": update},
            "train": {**train, **more},
        }
    )


BARS = {
    # Figure 3: LLaMA 7B, one A100-80G, batch 1 of 256 tokens, bf16, no activation checkpointing; GB as measured there.
    "Adam, full rank": (("full", 16, "whole"), 67.4),
    "8-bit Adam, per layer": (("full", 8, "per_layer"), 29.4),
    "8-bit GaLore, per layer": (("galore", 8, "per_layer"), 22.0),
    "8-bit SLTrain, per layer": (("sltrain", 8, "per_layer"), 18.3),
}


def test_dense_layers_belong_to_the_base() -> None:
    """A layer of llama_60m has 4·512² + 3·512·1376 dense weights, and as many values of moments twice."""
    none, two = (
        {each.method: each for each in paper_table(config.model, config.reparam)}
        for config in (
            build_config({"preset": "llama_60m", "reparam": {"dense_layers": listed}}) for listed in ([], [0, -1])
        )
    )
    dense, factors = 4 * 512**2 + 3 * 512 * 1376, 128 * (4 * 1024 + 3 * 1888)
    values = 4 * int(0.03 * 512**2) + 3 * int(0.03 * 512 * 1376)
    for method, more, index in (("lowrank", dense - factors, 0), ("sltrain", dense - factors - values, -values)):
        assert two[method].parameter_bytes - none[method].parameter_bytes == 2 * (2 * more + 8 * index)
        assert two[method].optimizer_bytes - none[method].optimizer_bytes == 2 * 4 * more
    assert all(two[method] == none[method] for method in ("full", "relora", "galore"))


@pytest.mark.parametrize("bar", list(BARS))
def test_figure_3(bar: str) -> None:
    settings, measured = BARS[bar]
    estimate = reference_estimate(seven_b(*settings))
    assert estimate.peak_bytes / 1e9 == pytest.approx(measured, rel=0.1)
    assert estimate.relative_error == 0.1 and estimate.method == "reference emulation"


def test_emulated_components() -> None:
    """Sizes that can be said without the module: weights, moments and the step's temporary, of 2 bytes a value."""
    full, sltrain = (
        reference_estimate(seven_b(*BARS[bar][0])) for bar in ("Adam, full rank", "8-bit SLTrain, per layer")
    )
    parameters = 6_738_415_616
    assert full.parameters == parameters and full.peak.where == "optimizer step"
    assert full.peak.components["states"] == 4 * parameters
    assert full.peak.components["temporaries.update"] == full.peak.components["gradients"] == 2 * parameters
    nonzeros = 32 * (4 * int(0.05 * 4096 * 4096) + 3 * int(0.05 * 4096 * 11_008))
    assert sltrain.peak.components["index"] == 8 * nonzeros == 4 * sltrain.peak.components["sparse_values"]
    # A·alpha/r of every layer: rank times in_features, 2 bytes.
    assert sltrain.peak.components["activations.scaled factors"] == 2 * 32 * 1024 * (6 * 4096 + 11_008)
    # Two norms a layer keep a float32 copy of their input, the normalized value and the output, and a root a token.
    norms = 32 * 2 * 256 * ((4 + 2 + 2) * 4096 + 4)
    assert sltrain.phases()["forward"].components["activations.norms"] == norms
    assert sltrain.phases()["forward"].total < sltrain.peak_bytes


def test_recorded_once_and_then_without_torch() -> None:
    settings = {"preset": "llama_60m", "reparam": {"method": "full"}}
    peak = reference_estimate(build_config(settings)).peak_bytes
    script = (
        "import sys\nfrom sltrain_dist.config.load import build_config\n"
        "from sltrain_dist.plan.paper.reference import reference_estimate\n"
        f"print(reference_estimate(build_config({settings!r})).peak_bytes)\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"{peak}\n"), result.stderr


def test_emulated_projection() -> None:
    """GaLore at down_proj (4096, 11008): projectors in bf16; two copies of the gradient, U and V in float32."""
    peak = reference_estimate(seven_b(*BARS["8-bit GaLore, per layer"][0])).peak
    assert peak.where == "layer 31, mlp, backward, update"
    assert peak.components["states.projectors"] == 2 * 32 * 7 * 1024 * 4096
    singular_values = 4 * 4096
    svd = 4 * (2 * 4096 * 11_008 + 4096 * (4096 + 11_008)) + singular_values
    assert peak.components["temporaries.update"] == svd
    assert peak.components["gradients"] == 2 * 4096 * 11_008


@pytest.mark.parametrize("measured", [22.8, 22.02])
def test_galore_with_recomputation(measured: float) -> None:
    """7B on an RTX 4090, 16 sequences of 256 tokens, in GB by GaLore's README and in Q-GaLore's run."""
    batch = {"micro_batch": 16, "global_batch": 16}
    estimate, kept = (
        reference_estimate(seven_b("galore", 8, "per_layer", activation_checkpointing=how, **batch))
        for how in ("full", "none")
    )
    assert estimate.peak_bytes / 1e9 == pytest.approx(measured, rel=0.05)
    assert estimate.peak.components["activations.residual"] == 2 * 32 * 16 * 256 * 4096  # the input of every layer
    assert kept.peak_bytes > 2 * estimate.peak_bytes and kept.flops_per_token < estimate.flops_per_token


def test_accumulation_holds_gradients_of_whole_updates_only() -> None:
    def forward(update: str, global_batch: int) -> int:
        estimate = reference_estimate(seven_b("full", 8, update, global_batch=global_batch))
        return estimate.phases()["forward"].components.get("gradients", 0)

    assert forward("whole", 2) == 2 * 6_738_415_616
    assert forward("whole", 1) == forward("per_layer", 2) == 0


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"reparam": {"method": "lowrank"}}, "reparam.method"),
        ({"reparam": {"support": "blocks"}}, "reparam.support"),
        ({"reparam": {"dense_layers": [0]}}, "reparam.dense_layers"),
        ({"optim": {"state_bits": 4}}, "optim.state_bits"),
        ({"optim": {"update": "per_layer"}}, "optim.update"),
        ({"train": {"dtype": "fp32"}}, "train.dtype"),
        ({"train": {"activation_checkpointing": "selective"}}, "train.activation_checkpointing"),
        ({"reparam": {"weight_bits": 8}}, "reparam.weight_bits"),
        ({"reparam": {"restart_every": 9}}, "reparam.restart_every"),
        ({"data": {"reset_attention": True, "batching": "pack"}}, "data.reset_attention"),
        ({"model": {"tie_head": True}}, "model.tie_head"),
    ],
)
def test_what_the_published_code_has_not(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: the published code has no such setting; set "):
        reference_estimate(build_config({"preset": "llama_60m", **settings}))
