"""config/differences.py: every key is compared, also inside of mappings."""

from __future__ import annotations

from typing import Any

from sltrain_dist.config.differences import changed_settings, flatten
from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import Config


def config(**values: Any) -> Config:
    return build_config({"train": {"steps": 1}, **values})


def test_nested_mappings_become_dotted_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": (2,)}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}


def test_every_key_is_compared() -> None:
    before = config()
    now = config(eval={"micro_batch": 3}, data={"cache_dir": "x"}, parallel={"engine": "zero", "deepspeed": {"a": 1}})
    assert list(changed_settings(before, now)) == [
        ("data.cache_dir", None, "x"),
        ("parallel.engine", "ddp", "zero"),
        ("parallel.deepspeed.a", None, 1),
        ("eval.micro_batch", None, 3),
    ]


def test_a_support_seed_that_is_not_set_is_that_of_the_run() -> None:
    before = config(seed=3)
    assert list(changed_settings(before, config(seed=3, reparam={"support_seed": 3}))) == []
    assert list(changed_settings(before, config(seed=3, reparam={"support_seed": 4}))) == [
        ("reparam.support_seed", 3, 4)
    ]
