"""What the arms of a study must have in common, so that only what is compared differs (no torch)."""

from __future__ import annotations

from collections.abc import Mapping

from sltrain_dist.config.differences import changed_settings
from sltrain_dist.config.rules import check_ranks, check_trainable
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError

_SAME_SECTIONS = ("data", "eval")
_SAME_KEYS = ("train.global_batch", "model.vocab_size")
HARMLESS = frozenset(
    f"data.{name}" for name in ("workers", "prefetch", "retries", "retry_wait_s", "timeout_s", "cache_dir")
) | {"eval.micro_batch"}
"""Settings of these sections that change neither the batches nor the evaluation tokens."""


def check_arms(arms: Mapping[str, Config], shortest: int) -> None:
    """Checks that every arm can be trained, on the same batches, and evaluated on the same tokens as the others.

    Args:
        arms: A configuration of each arm.
        shortest: Tokens of the shortest trial.

    Raises:
        ConfigError: An arm cannot be trained in one process, or not fairly.
    """
    first, common = next(iter(arms.items()))
    for arm, config in arms.items():
        try:
            check_trainable(config)
            check_ranks(config, 1)
            _check_evaluation(config, shortest)
        except ConfigError as error:
            raise ConfigError(f"arm {arm}: {error}") from None
        for key, ours, theirs in changed_settings(common, config):
            if (key.partition(".")[0] in _SAME_SECTIONS and key not in HARMLESS) or key in _SAME_KEYS:
                raise ConfigError(
                    f"arm {arm}: {key} = {theirs!r}, but {ours!r} in arm {first}: all arms must be trained on the "
                    "same batches and evaluated on the same tokens; set it in base"
                )


def _check_evaluation(config: Config, shortest: int) -> None:
    """Refuses a configuration whose result would be missing, or that of a run which never left the warm-up."""
    if config.eval.source is None:
        raise ConfigError("eval.source = null: a study compares validation losses; set eval.source in base")
    warmup_tokens = config.optim.warmup_steps * config.train.global_batch * config.data.seq_len
    if config.data.batching == "pack" and warmup_tokens >= shortest:  # padded rows have an unknown number of tokens
        raise ConfigError(
            f"optim.warmup_steps = {config.optim.warmup_steps} updates take {warmup_tokens:,} tokens, but the shortest "
            f"trial has {shortest:,}; lower it, or raise budgets or tuning_tokens"
        )
