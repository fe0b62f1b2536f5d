"""DeepSpeed's configuration, as it is written from ours."""

from __future__ import annotations

from typing import Any

import pytest

from sltrain_dist.config.load import load_config
from sltrain_dist.parallel.zero_start import deepspeed_config

NUMEL = 10_753_128


def settings(*overrides: str, ranks: int = 2) -> dict[str, Any]:
    config = load_config(None, ["preset=llama_60m", "parallel.engine=zero", *overrides])
    return deepspeed_config(config, ranks, NUMEL)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_its_defaults_would_do_wrong_is_written_out(stage: int) -> None:
    values = settings(f"parallel.zero_stage={stage}", "optim.clip=0.5")
    assert values["gradient_clipping"] == 0.0  # left out, it clips at 1.0
    assert values["zero_optimization"]["stage"] == stage
    assert values["zero_optimization"]["reduce_bucket_size"] <= NUMEL + 1
    assert values["gradient_allreduce_op"] == ("mean" if stage == 3 else "sum")
    assert values["bf16"]["bf16_master_weights_and_grads"]
    assert values["train_batch_size"] == 512
    assert values["gradient_accumulation_steps"] * values["train_micro_batch_size_per_gpu"] * 2 == 512


@pytest.mark.parametrize("dtype", ["fp32", "mixed"])
def test_float32_parameters_are_left_alone(dtype: str) -> None:
    assert "bf16" not in settings(f"train.dtype={dtype}")


def test_stage_3_frees_what_it_gathers() -> None:
    zero = settings("parallel.zero_stage=3", "parallel.prefetch_blocks=2")["zero_optimization"]
    block = -(-NUMEL // 8)
    assert zero["stage3_max_live_parameters"] == 3 * block
    assert zero["stage3_prefetch_bucket_size"] == 2 * block
    assert zero["stage3_param_persistence_threshold"] == zero["stage3_max_reuse_distance"] == 0


def test_offload() -> None:
    values = settings("parallel.cpu_offload=true", "train.dtype=fp32")
    assert values["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "compute_grad_norm" not in values["zero_optimization"]  # which it refuses together
    assert "offload_optimizer" not in settings()["zero_optimization"]


def test_more_keys_go_in_beside_ours() -> None:
    more = "parallel.deepspeed={zero_optimization: {overlap_comm: true}, communication_data_type: fp32}"
    values = settings(more)
    assert values["communication_data_type"] == "fp32"
    assert values["zero_optimization"]["overlap_comm"] is True
    assert values["zero_optimization"]["stage"] == 2
    assert settings("parallel.deepspeed.zero_optimization.overlap_comm=true") == settings(
        "parallel.deepspeed={zero_optimization: {overlap_comm: true}}"
    )
