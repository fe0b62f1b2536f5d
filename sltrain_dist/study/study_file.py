"""The file that describes a study, and the trials that it stands for (no torch)."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from sltrain_dist.config.load import (
    COMMAND_LINE,
    build_config,
    fill_sections,
    parse_override,
    read_mapping,
    set_value,
)
from sltrain_dist.config.paths import expand
from sltrain_dist.config.rules import leaf_keys
from sltrain_dist.config.schema import Config, CountOrZero, PositiveFloat, PositiveInt
from sltrain_dist.errors import ConfigError
from sltrain_dist.study.fairness import check_arms

_SET_BY = {
    "seed": "seeds and tuning_seed",
    "run_dir": "study_dir",
    "optim.lr": "lrs",
    "train.steps": "budgets, in tokens",
    "train.tokens": "budgets",
    "train.dry_run": "the study itself",
    "checkpoint.resume": "the study itself",
    "tracking.run_name": "the study itself",
    "tracking.mlflow_parent": "the study itself",
}
"""Settings of the trials that a study sets, with the key of the study that they come from."""

_ArmName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
"""Name of an arm, which is a part of directory names and of metric names."""


class ArmFile(BaseModel):
    """An arm: what it changes in the base configuration, as sections or as dotted keys."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    lrs: Annotated[list[PositiveFloat], Field(min_length=1)] | None = None
    """Learning rates to choose from for this arm. Null: those of the study."""


class StudyFile(BaseModel):
    """The content of a study's file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    study_dir: str
    """Directory of everything that the study writes. `~` and environment variables are expanded."""
    base: dict[str, Any]
    """The configuration that all arms share, with the sections of a training configuration and perhaps a preset."""
    arms: Annotated[dict[_ArmName, ArmFile], Field(min_length=1)]
    """The arms, by name."""
    lrs: Annotated[list[PositiveFloat], Field(min_length=1)]
    """Peak learning rates. The best one is chosen for each arm and budget. With a single one, there is no choice."""
    tuning_seed: CountOrZero = 0
    """Seed of the trials that choose the learning rate. None of `seeds`, so that no result is chosen for its luck."""
    tuning_tokens: PositiveInt | None = None
    """Tokens of the trials that choose the learning rate. Null: as many as the budget that they choose for."""
    seeds: Annotated[list[CountOrZero], Field(min_length=1)]
    """Seeds of the reported trials: of their initial values, supports and data order."""
    budgets: Annotated[list[PositiveInt], Field(min_length=1)]
    """Tokens to train on. Each budget is a separate comparison, with runs of that length."""
    reference: str | None = None
    """Arm that the others are subtracted from, seed by seed. Null: no differences are reported."""


@dataclass(frozen=True)
class Trial:
    """One training run of a study. Its name, and so its directory, is unique in the study.

    Attributes:
        arm: Name of the arm.
        tokens: Tokens to train on.
        lr: Peak learning rate.
        seed: The run's seed.
        config: The configuration of the run.
    """

    arm: str
    tokens: int
    lr: float
    seed: int
    config: Config = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """Name of the run directory."""
        return trial_name(self.arm, self.tokens, self.lr, self.seed)

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.config.run_dir)

    def __str__(self) -> str:
        return f"{self.arm}, {self.tokens:,} tokens, lr {self.lr:g}, seed {self.seed}"


def trial_name(arm: str, tokens: int, lr: float, seed: int) -> str:
    """Returns the name of a trial's run directory."""
    return f"{arm}-{tokens}-lr{lr!r}-seed{seed}"


class Study:
    """A checked study. All its possible trials are loaded when it is built.

    Args:
        file: The content of the study's file.
        base: The base configuration's values, with the overrides of the command line.
        origin: Origin of each dotted key of `base`, for messages; "" is the study's file.

    Attributes:
        file: The content of the study's file.
        directory: Directory of everything that the study writes.

    Raises:
        ConfigError: A trial cannot be run, or two arms would not be compared fairly.
    """

    def __init__(self, file: StudyFile, base: dict[str, Any], origin: Mapping[str, str]) -> None:
        self.file, self.directory = file, Path(expand(file.study_dir))
        self._base, self._origin = base, origin
        self._trials: dict[str, Trial] = {}
        for arm, budget in self.comparisons():
            self.tuning(arm, budget)
            for lr in self.lrs(arm):
                self.reported(arm, budget, lr)
        check_arms({arm: self.example(arm) for arm in file.arms}, min(trial.tokens for trial in self._trials.values()))

    def comparisons(self) -> Iterator[tuple[str, int]]:
        """Yields (arm, budget) of all rows of the result."""
        for budget in self.file.budgets:
            for arm in self.file.arms:
                yield arm, budget

    def lrs(self, arm: str) -> list[float]:
        """Returns the learning rates to choose from for an arm."""
        return self.file.arms[arm].lrs or self.file.lrs

    def tuning(self, arm: str, budget: int) -> list[Trial]:
        """Returns the trials that choose the learning rate; none if there is only one learning rate."""
        lrs = self.lrs(arm)
        tokens = self.file.tuning_tokens or budget
        return [self._trial(arm, tokens, lr, self.file.tuning_seed) for lr in lrs] if len(lrs) > 1 else []

    def reported(self, arm: str, budget: int, lr: float) -> list[Trial]:
        """Returns the trials whose results are reported if the learning rate `lr` is chosen."""
        return [self._trial(arm, budget, lr, seed) for seed in self.file.seeds]

    def example(self, arm: str) -> Config:
        """Returns the configuration of one of the arm's trials."""
        return self.reported(arm, self.file.budgets[0], self.lrs(arm)[0])[0].config

    def _trial(self, arm: str, tokens: int, lr: float, seed: int) -> Trial:
        name = trial_name(arm, tokens, lr, seed)
        if name not in self._trials:
            self._trials[name] = Trial(arm, tokens, lr, seed, self._config(arm, tokens, lr, seed))
        return self._trials[name]

    def _config(self, arm: str, tokens: int, lr: float, seed: int) -> Config:
        values, whose = copy.deepcopy(self._base), f"{self._origin['']}: arm {arm}"
        origin = dict(self._origin) | {"": whose}
        name = trial_name(arm, tokens, lr, seed)
        own = copy.deepcopy(self.file.arms[arm].model_extra or {})
        fill_sections(own, whose)
        for key, value in own.items():
            set_value(values, tuple(key.split(".")), value, whose)
            origin |= dict.fromkeys(leaf_keys(value, tuple(key.split("."))), whose)
        _refuse_controlled(values, origin)
        settings = {"seed": seed, "run_dir": str(self.directory / "runs" / name), "optim": {"lr": lr}}
        settings |= {"train": {"steps": None, "tokens": tokens}, "tracking": {"run_name": name}}
        for section, value in settings.items():
            set_value(values, (section,), value)
        return build_config(values, origin)


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Loads and checks a study, with all its trials.

    Args:
        path: The YAML file.
        overrides: `section.key=value` strings, which change the base configuration and not what arms set, and
            `key=value` strings for the study's own keys, such as `seeds=[1,2]`.

    Raises:
        ConfigError: The file cannot be read, or a key or a value is invalid, or a trial cannot be run.
    """
    values = read_mapping(path)
    base = values.get("base")
    base = values["base"] = {} if base is None else base
    if isinstance(arms := values.get("arms"), dict):
        values["arms"] = {name: {} if arm is None else arm for name, arm in arms.items()}  # the base as it is
    own: dict[str, str] = {}
    origin = {"": str(path)}
    if isinstance(base, dict):
        fill_sections(base, f"{path}: base")
        origin |= dict.fromkeys(leaf_keys(base), f"{path}: base")
    for override in overrides:
        key, value = parse_override(override)
        if key[0] in StudyFile.model_fields:
            if len(key) > 1 or key[0] in ("base", "arms"):
                hint = "write section.key=value" if key[0] == "base" else "change the file"
                raise ConfigError(f"{COMMAND_LINE}: {override!r} cannot set a part of {key[0]}; {hint}")
            values[key[0]], own[key[0]] = value, COMMAND_LINE
        elif isinstance(base, dict):
            set_value(base, key, value)
            origin |= dict.fromkeys(leaf_keys(value, key), COMMAND_LINE)
    return Study(_parse(values, path, own), base, origin)


def _parse(values: dict[str, Any], path: Path, origin: Mapping[str, str]) -> StudyFile:
    """Checks the content of a study's file, apart from the configurations in it."""
    try:
        file = StudyFile.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False):
            place = ".".join(str(part) for part in item["loc"])
            reason = item["msg"].removeprefix("Input ")
            if item["type"] == "extra_forbidden":
                reason = f"unknown key; a study has {', '.join(StudyFile.model_fields)}"
            elif item["loc"][-1] == "[key]":
                reason = "an arm's name is at most 64 letters, digits, '.', '_' and '-', the first a letter or digit"
            problems.append(f"{origin.get(str(item['loc'][0]), path)}: {place}: {reason}")
        raise ConfigError("\n".join(problems)) from None
    wrong = [f"{origin.get(key, path)}: {key} {reason}" for key, reason in _contradictions(file)]
    if wrong:
        raise ConfigError("\n".join(wrong))
    return file


def _contradictions(file: StudyFile) -> Iterator[tuple[str, str]]:
    """Yields (key, what is wrong and what to change) for keys that contradict each other."""
    lists: dict[str, Sequence[float]] = {"lrs": file.lrs, "seeds": file.seeds, "budgets": file.budgets}
    lists |= {f"arms.{name}.lrs": arm.lrs for name, arm in file.arms.items() if arm.lrs}
    for key, entries in lists.items():
        twice = [entry for entry, count in Counter(entries).items() if count > 1]
        if twice:
            yield key, f"has {twice[0]:g} twice; remove one"
    has_choice = any(len(arm.lrs or file.lrs) > 1 for arm in file.arms.values())
    if has_choice and file.tuning_seed in file.seeds:
        yield (
            "seeds",
            f"has {file.tuning_seed}, which is tuning_seed: the learning rate would be chosen on a reported result; "
            "change one of the two",
        )
    if file.reference is not None and file.reference not in file.arms:
        yield "reference", f"= {file.reference!r} is not an arm; the arms are {', '.join(file.arms)}"
    try:
        expand(file.study_dir)
    except ValueError as error:
        yield "study_dir", f"= {file.study_dir!r}: {error}"


def _refuse_controlled(values: Mapping[str, Any], origin: Mapping[str, str]) -> None:
    """Refuses settings in the base and the arms that the study sets itself.

    Raises:
        ConfigError: There is one.
    """
    for key in leaf_keys(values):
        if key in _SET_BY:
            raise ConfigError(f"{origin.get(key, origin[''])}: {key} is set by {_SET_BY[key]}; leave it out here")
