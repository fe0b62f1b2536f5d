"""Every configuration that is shipped, and every preset, can be run as far as a machine without data can tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from sltrain_dist.config.load import build_config, load_config, to_yaml
from sltrain_dist.config.presets import PRESETS
from sltrain_dist.config.rules import micro_batches_per_update, without_effect
from sltrain_dist.models.build import build_meta_model
from sltrain_dist.models.count import count_parameters
from sltrain_dist.study.study_file import load_study
from tests.support.runs import REPO

CONFIGS = sorted((REPO / "configs").glob("*.yaml"))
STUDIES = sorted((REPO / "configs" / "studies").glob("*.yaml"))
SMALL = {"quickstart": (1, 2)}
"""Those of no preset, and the numbers of ranks that they are for."""


def test_there_is_one_for_every_preset() -> None:
    assert {path.stem for path in CONFIGS} == {*PRESETS, *SMALL}


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_shipped_configuration(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert config.run_dir == f"runs/{path.stem}"
    assert list(without_effect(config)) == []
    for ranks in SMALL.get(path.stem, (1, 2, 4, 8)):
        assert micro_batches_per_update(config, ranks) >= 1
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config
    # The options that its comments name.
    for override in ("reparam.method=full", "parallel.engine=ddp", "train.dry_run=true"):
        load_config(path, [override])


@pytest.mark.parametrize("path", STUDIES, ids=[path.stem for path in STUDIES])
def test_shipped_study(path: Path) -> None:
    """All its trials load. The options that its comments name are accepted."""
    study = load_study(path, ["data.source=data/mine", "eval.source=data/mine", "data.tokenizer=data/mine/t.model"])
    assert study.directory == Path("runs/studies") / path.stem
    assert study.example(next(iter(study.file.arms))).data.source == "data/mine"


@pytest.mark.parametrize("engine", ["ddp", "zero"])
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_under_every_engine(preset: str, engine: str) -> None:
    config = build_config({"preset": preset, "parallel": {"engine": engine}})
    assert config.parallel.engine == engine
    assert config.train.global_batch == 512
    model = build_meta_model(config)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config.model, config.reparam).total
