"""Configuration: loading, presets, rules, and above all what the messages say."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from sltrain_dist.config import schema
from sltrain_dist.config.load import build_config, load_config, parse_override, run_dir_of, to_yaml
from sltrain_dist.config.paths import expand, path_option
from sltrain_dist.config.presets import PRESETS
from sltrain_dist.config.rules import check_fields, check_trainable, micro_batches_per_update, without_effect
from sltrain_dist.config.schema import Config, ModelConfig
from sltrain_dist.config.strict_yaml import Dumper, Loader
from sltrain_dist.errors import ConfigError, ExitCode
from sltrain_dist.models.count import count_parameters

RUNNABLE = "train: {steps: 10}\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def _write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def message(path: Path | str | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code is ExitCode.CONFIG
    return str(caught.value)


class TestSchema:
    def test_every_field_is_documented(self) -> None:
        """By a docstring right below it."""
        classes = [node for node in ast.parse(inspect.getsource(schema)).body if isinstance(node, ast.ClassDef)]
        bodies = {node.name: node.body for node in classes if node.name.endswith("Config")}
        assert len(bodies) == 10
        fields = [(name, *pair) for name, body in bodies.items() for pair in pairwise([*body, ast.Pass()])]
        undocumented = [
            f"{name}.{ast.unparse(field.target)}"
            for name, field, below in fields
            if isinstance(field, ast.AnnAssign)
            and not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant))
        ]
        sections = [f"Config.{name}" for name, value in Config() if isinstance(value, BaseModel)]
        assert undocumented == sections  # whose classes have docstrings

    def test_frozen(self) -> None:
        config = load_config(None, ["train.steps=1"])
        with pytest.raises(ValidationError, match="frozen"):
            config.train.steps = 2

    def test_derived_sizes(self) -> None:
        assert ModelConfig(hidden_size=64, num_heads=4).head_dim == 16
        assert ModelConfig(num_heads=4).kv_heads == 4
        assert ModelConfig(num_heads=4, num_kv_heads=2).kv_heads == 2


class TestLoading:
    def test_file_then_overrides(self, write: Callable[[str], Path]) -> None:
        path = write("train: {steps: 10, global_batch: 64}\noptim: {lr: 0.5}\nseed: 4\n")
        config = load_config(path, ["train.steps=20", "optim.lr=1e-4", "optim.lr=2e-4", "data.source=[a, b]"])
        assert (config.train.steps, config.train.global_batch, config.seed) == (20, 64, 4)
        assert config.optim.lr == 2e-4
        assert config.data.source == ["a", "b"]
        assert config.optim.beta1 == Config().optim.beta1

    def test_whole_section_as_override_leaves_its_other_keys(self, write: Callable[[str], Path]) -> None:
        config = load_config(write("train: {steps: 10, global_batch: 64}"), ["train={steps: 5}"])
        assert (config.train.steps, config.train.global_batch) == (5, 64)

    @pytest.mark.parametrize("text", ["", "# nothing\n", "train:\nmodel:\npreset:\n"])
    def test_empty_file_and_empty_sections_are_defaults(self, write: Callable[[str], Path], text: str) -> None:
        assert load_config(write(text), ["train.steps=3"]) == load_config(None, ["train.steps=3"])

    def test_override_value_may_hold_an_equals_sign(self) -> None:
        assert load_config(None, ["train.steps=1", "data.source=s3://b?x=y"]).data.source == "s3://b?x=y"

    def test_null_values(self) -> None:
        config = load_config(None, ["train.steps=null", "train.tokens=100", "eval.source=~", "tracking.run_name="])
        assert (config.train.steps, config.eval.source, config.tracking.run_name) == (None, None, None)

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1e-3", 1e-3),
            ("3E+2", 300.0),
            ("1.5e2", 150.0),
            (".5e1", 5.0),
            ("+.5", 0.5),
            ("2.", 2.0),
            ("7", 7.0),
            ("1_000.5", 1000.5),
        ],
    )
    def test_floats(self, text: str, value: float) -> None:
        assert load_config(None, ["train.steps=1", f"optim.lr={text}"]).optim.lr == value

    @pytest.mark.parametrize("text", ["2024-01-01", "1:30", "010", "1e", "e5", "1.2.3", "."])
    def test_what_only_looks_like_a_number_is_text(self, text: str) -> None:
        assert load_config(None, ["train.steps=1", f"run_dir={text}"]).run_dir == text

    def test_yaml_round_trip(self) -> None:
        config = load_config(None, ["train.steps=7", "optim.lr=1e-5", "data.source=[a, 'ü: b']", "eval.source=null"])
        assert build_config(yaml.safe_load(to_yaml(config))) == config

    @pytest.mark.parametrize("text", ["1e-3", "12", "010", "null", "true", "a: b", "2024-01-01", "ü", "1_0", "*x"])
    def test_round_trip_of_awkward_text(self, write: Callable[[str], Path], text: str) -> None:
        config = build_config({"run_dir": text, "train": {"steps": 1}})
        assert load_config(write(to_yaml(config))) == config

    @given(st.text(max_size=12))
    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_override_loads_or_is_a_config_error(self, text: str) -> None:
        try:
            assert isinstance(load_config(None, ["train.steps=1", f"tracking.run_name={text}"]), Config)
        except ConfigError as error:
            assert str(error).startswith("command line: ")

    @given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=30))
    @settings(max_examples=200, deadline=None)
    def test_any_text_survives_yaml(self, text: str) -> None:
        written = yaml.dump({"run_name": text}, Dumper=Dumper, allow_unicode=True)  # as to_yaml, which takes longer
        assert yaml.load(written, Loader) == {"run_name": text}


class TestPaths:
    """Every field that can hold a path."""

    @pytest.fixture(autouse=True)
    def _environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/me")
        monkeypatch.setenv("SCRATCH", "/scratch/me")
        monkeypatch.setenv("EMPTY", "")
        monkeypatch.delenv("NOPE", raising=False)

    @pytest.mark.parametrize(
        ("written", "expanded"),
        [
            ("~/runs/x", "/home/me/runs/x"),
            ("~", "/home/me"),
            ("$SCRATCH/x", "/scratch/me/x"),
            ("${SCRATCH}/x-$SCRATCH", "/scratch/me/x-/scratch/me"),
            ("a~b/$", "a~b/$"),
            ("./~x", "./~x"),
            ("file://$SCRATCH/x", "file:///scratch/me/x"),
            ("https://host/x?sig=$NOPE", "https://host/x?sig=$NOPE"),
            ("s3://bucket/~/x", "s3://bucket/~/x"),
        ],
    )
    def test_are_expanded(self, written: str, expanded: str) -> None:
        assert expand(written) == expanded
        assert expand(expanded) == expanded  # config.yaml, which holds what was expanded, can be read again

    @pytest.mark.parametrize(
        ("written", "expected"),
        [
            ("", "is empty; give a path"),
            ("  ", "is empty; give a path"),
            ("$NOPE/x", "the environment variable NOPE is not set; set it"),
            ("${NOPE}", "the environment variable NOPE is not set"),
            ("$EMPTY/x", "the environment variable EMPTY is empty"),
            ("~nobody-of-this-name/x", "there is no home directory ~nobody-of-this-name; for a file of that name"),
            ("a\0b", "contains a NUL character"),
        ],
    )
    def test_that_are_none(self, written: str, expected: str) -> None:
        with pytest.raises(ValueError, match=re.escape(expected)):
            expand(written)
        with pytest.raises(ConfigError, match=re.escape(f"--output {written!r}: ")):
            path_option("--output")(written)

    @pytest.mark.parametrize(
        "key",
        [
            "run_dir",
            "data.source",
            "data.tokenizer",
            "data.cache_dir",
            "eval.source",
            "checkpoint.resume",
            "checkpoint.init_from",
            "tracking.mlflow_uri",
        ],
    )
    def test_every_field(self, key: str) -> None:
        config = load_config(None, ["train.steps=1", f"{key}=$SCRATCH/x"])
        section, _, name = key.rpartition(".")
        assert getattr(getattr(config, section) if section else config, name) == "/scratch/me/x"
        assert load_config(None, ["train.steps=1", f"{key}='~/x'"]) == build_config(
            yaml.safe_load(to_yaml(load_config(None, ["train.steps=1", f"{key}=/home/me/x"])))
        )
        assert message(None, "train.steps=1", f"{key}=$NOPE/x") == (
            f"command line: {key} = '$NOPE/x': the environment variable NOPE is not set; set it, or write the path out"
        )
        assert message(None, "train.steps=1", f"{key}=''") == f"command line: {key} = '': is empty; give a path"

    def test_lists(self) -> None:
        config = load_config(None, ["train.steps=1", "data.source=['~/a', $SCRATCH/b]", "eval.source=[$SCRATCH/c]"])
        assert (config.data.source, config.eval.source) == (["/home/me/a", "/scratch/me/b"], ["/scratch/me/c"])
        assert "is empty" in message(None, "train.steps=1", "data.source=[a, '']")

    def test_the_file_itself_and_its_run_dir(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SCRATCH", str(tmp_path))
        (tmp_path / "x.yaml").write_text("run_dir: ~/runs\ntrain: {stepz: 1}\n")
        assert "did you mean train.steps?" in message("$SCRATCH/x.yaml")
        assert run_dir_of("$SCRATCH/x.yaml") == "/home/me/runs"
        assert run_dir_of("$SCRATCH/x.yaml", ["run_dir=$NOPE"]) is None


NESTED = "[" * 5000 + "]" * 5000
ALIASES = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 25))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 25))


class TestHostileInput:
    """What once took forever or ended in a traceback: a message, and no work in proportion to what it stands for."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("a: &a {b: *a}", "line 1, column 11: not valid YAML: an alias refers to a node that contains it"),
            ("a: &a [*a]", "an alias refers to a node that contains it"),
            ("a: &a {<<: *a}", "an alias refers to a node that contains it"),
            (ALIASES, "more than 100,000 values, counting the values that aliases expand to"),
            (MERGES, "more than 100,000 values, counting the values that aliases expand to"),
            (f"x: {NESTED}", "more than 32 levels of nesting"),
            ("a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 99)), "more than 32 levels"),
            (f"train: {{steps: {'9' * 5000}}}", "a whole number of 5,000 characters"),
            (f"train: {{steps: 0x{'f' * 5000}}}", "a whole number of 5,002 characters"),
            (f"train: {{steps: 1{'0' * 400}}}", "should be less than or equal to 9223372036854775807"),
            (f"seed: 1{'_' * 100_000}", "a whole number of 100,001 characters"),
            (f"seed: 1{'_' * 100_000}x", "should be a whole number"),
            (f"%YAML {'1' * 5000}.1\n--- a", "not valid YAML: Exceeds the limit"),
            ('seed: "\\UFFFFFFFF"', "not valid YAML: Python int too large"),
            ("seed: !!int x", "the value does not suit its tag !!int"),
            ("seed: !!timestamp x", "the value does not suit its tag !!timestamp"),
            ("seed: !!bool x", "the value does not suit its tag !!bool"),
            ('run_dir: "\\uD800"', "half of a surrogate pair"),
            (f"x: '{'y' * 2_000_000}'", "a configuration has at most 1,048,576 bytes"),
        ],
    )
    def test_yaml(self, write: Callable[[str], Path], text: str, expected: str) -> None:
        assert expected in message(write(text))

    def test_quotes_do_not_help_against_size(self) -> None:
        assert "levels of nesting" in message(None, f"seed={NESTED}")
        assert "needs quotes" not in message(None, f"seed={NESTED}")

    def test_aliases_and_merges_as_people_use_them(self, write: Callable[[str], Path]) -> None:
        config = load_config(write("data: &d {source: [a, b], split: x}\neval: {<<: *d, every: 3}\ntrain: {steps: 1}"))
        assert (config.eval.source, config.eval.split, config.eval.every) == (["a", "b"], "x", 3)

    def test_endless_files(self) -> None:
        assert "at most 1,048,576 bytes" in message(Path("/dev/zero"))

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("model.num_layers=1000000000", "model.num_layers = 1000000000: should be less than or equal to 10000"),
            ("model.vocab_size=1099511627776", "should be less than or equal to 16777216"),
            ("model.hidden_size=4194304", "makes a model of about 5.6e+14 dense parameters"),
            ("train.micro_batch=1000000000000", "should be less than or equal to 16777216"),
            ("data.seq_len=1000000000000", "should be less than or equal to 16777216"),
            ("eval.micro_batch=16777216", "is more than the 1,073,741,824 tokens that a device could hold"),
            ("data.workers=100000", "should be less than or equal to 4096"),
            ("parallel.timeout_s=1000000000000", "should be less than or equal to 10000000"),
            ("data.timeout_s=1e300", "should be less than or equal to 10000000"),
            (f"optim.lr=1{'0' * 400}", "should be a number"),
        ],
    )
    def test_sizes_that_no_machine_could_hold(self, override: str, expected: str) -> None:
        assert expected in message(None, "train.steps=1", override)

    def test_a_number_that_python_will_not_print(self) -> None:
        with pytest.raises(ConfigError, match=r"seed = a number of 16,610 bits: should be less than or equal to"):
            build_config({"seed": 10**5000, "train": {"steps": 1}})


class TestMessages:
    """One line a problem: where it came from, the key, the value, the reason, what to change."""

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            # unknown keys
            ("train.stepz=3", "train.stepz = 3: unknown key; did you mean train.steps?"),
            ("lr=3", "lr = 3: unknown key; did you mean optim.lr?"),
            ("train.lr=3", "train.lr = 3: unknown key; did you mean optim.lr?"),
            ("train.seed=3", "train.seed = 3: unknown key; did you mean seed?"),
            ("resume=never", "resume = 'never': unknown key; did you mean checkpoint.resume?"),
            ("source=x", "source = 'x': unknown key; did you mean data.source or eval.source?"),
            ("Train.steps=3", "Train = {'steps': 3}: unknown key; did you mean train?"),
            ("hiden_size=3", "hiden_size = 3: unknown key; did you mean model.hidden_size?"),
            (
                "checkpoint.zzz=3",
                "checkpoint.zzz = 3: unknown key; valid keys: every, init_from, keep, keep_every, resume",
            ),
            # wrong types
            ("optim.lr=fast", "optim.lr = 'fast': should be a number"),
            ("optim.lr=null", "optim.lr = null: should be a number"),
            ("seed=1.5", "seed = 1.5: should be a whole number"),
            ("seed='1'", "seed = '1': should be a whole number"),
            ("seed=true", "seed = true: should be a whole number"),
            ("train.tokens=1e9", "train.tokens = 1000000000.0: should be a whole number; write 1000000000"),
            ("train.dry_run=1", "train.dry_run = 1: should be true or false"),
            ("run_dir=2024", "run_dir = 2024: should be text; put it in quotes"),
            ("data.subset=no", "data.subset = false: should be text; put it in quotes"),
            ("data.source=[1]", "data.source = [1]: should be text or a list of texts"),
            ("data.source=3", "data.source = 3: should be text or a list of texts"),
            ("eval.source={a: 1}", "eval.source = {'a': 1}: should be text or a list of texts"),
            # out of range
            ("train.micro_batch=0", "train.micro_batch = 0: should be greater than 0"),
            ("reparam.density=1.5", "reparam.density = 1.5: should be less than or equal to 1"),
            ("optim.lr=.nan", "optim.lr = nan: should be a finite number"),
            (
                "reparam.method=sltran",
                "'sltran': should be 'sltrain', 'full', 'lowrank', 'cola', 'relora', 'galore', 'apollo' or "
                "'apollo-mini'; did you mean 'sltrain'?",
            ),
            # sections and values
            ("train=5", "train = 5: this is a section; give it keys with values"),
            ("train=", "train = null: this is a section; give it keys with values"),
            ("seed.x=3", "seed.x = 3: seed is a value, not a section"),
            ("train.steps.x=3", "train.steps.x = 3: train.steps is a value, not a section"),
            # presets
            ("preset=llama_60", "preset = 'llama_60': unknown preset; did you mean 'llama_60m'?"),
            ("preset=xyz", "preset = 'xyz': unknown preset; valid names: llama_130m, llama_1b"),
            ("preset=[a]", "preset = ['a']: unknown preset; valid names: "),
            # combinations
            ("model.num_heads=3", "model.num_heads = 3: does not divide model.hidden_size = 512"),
            ("data.reset_attention=true", "data.reset_attention = true: a padded row holds one document"),
        ],
    )
    def test_override(self, override: str, expected: str) -> None:
        text = message(None, "train.steps=1", override)
        assert "\n" not in text
        assert text.startswith("command line: ")
        assert expected in text

    @pytest.mark.parametrize("override", ["train.steps", "=3", "train.=3", ".steps=3", "train..steps=3", ""])
    def test_not_an_override(self, override: str) -> None:
        assert message(None, override) == f"command line: {override!r} is not of the form section.key=value"

    def test_override_that_needs_quotes(self) -> None:
        text = message(None, "data.source=[*.json.gz]")
        assert "the value of data.source" in text
        assert "quotes" in text

    @pytest.mark.parametrize("glob", ["*.json.gz", "*/a.json"])
    def test_globs_in_files_need_quotes(self, write: Callable[[str], Path], glob: str) -> None:
        assert "text that begins with * needs quotes" in message(write(f"data: {{source: {glob}}}"))

    def test_globs_need_no_quotes(self) -> None:
        assert parse_override("data.source=*.json.gz") == (("data", "source"), "*.json.gz")

    def test_names_that_are_not_utf_8(self) -> None:
        text = message(None, "data.source=data/caf\udce9.jsonl")
        assert r"the value of data.source is not UTF-8: data/caf\xe9.jsonl." in text
        assert "a glob" in text

    def test_several_problems_are_told_together(self, write: Callable[[str], Path]) -> None:
        path = write("optim: {lrr: 3, beta1: 4}\ntrain: {steps: x}")
        assert sorted(message(path).splitlines()) == [
            f"{path}: optim.beta1 = 4: should be less than 1",
            f"{path}: optim.lrr = 3: unknown key; did you mean optim.lr?",
            f"{path}: train.steps = 'x': should be a whole number",
        ]

    def test_several_broken_rules_are_told_together(self) -> None:
        text = message(None, "train.steps=1", "optim.warmup_steps=2", "train.micro_batch=7")
        assert [line.split(" = ")[0] for line in text.splitlines()] == [
            "command line: optim.warmup_steps",
            "command line: train.micro_batch",
        ]

    def test_where_a_value_came_from(self, write: Callable[[str], Path]) -> None:
        path = write("preset: llama_60m\nreparam: {rank: 600}\n")
        assert message(path).startswith(f"{path}: reparam.rank = 600: is larger than")
        assert message(path, "reparam.rank=700").startswith("command line: reparam.rank = 700: ")
        assert message(None, "preset=llama_60m", "train.steps=5").startswith(
            "preset llama_60m: optim.warmup_steps = 1100: is longer than the run; at most train.steps = 5"
        )
        assert message(None).startswith("configuration: train.steps = null (default): set exactly one of")

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            ("[0,8]", "[0, 8]: has 8, but model.num_layers = 8; the layers are 0 to 7, or from the end -1 to -8"),
            ("[0,-8]", "[0, -8]: has decoder layer 0 twice, as 0 and -8; remove one of the two"),
            ("[1,true]", "[1, True]: should be a whole number"),
            ("first", "'first': should be a list"),
            ("3", "3: should be a list"),
        ],
    )
    def test_dense_layers(self, value: str, reason: str) -> None:
        text = message(None, "train.steps=1", f"reparam.dense_layers={value}")
        assert text == f"command line: reparam.dense_layers = {reason}"

    def test_dense_layers_of_a_dense_method(self) -> None:
        text = message(None, "train.steps=1", "reparam.dense_layers=[0]", "reparam.method=full")
        assert text.endswith("[0]: is for reparam.method=sltrain, lowrank or cola; set it to [] with full")

    @pytest.mark.parametrize(
        ("overrides", "text"),
        [
            (
                "reparam.restart_every=50 reparam.method=full",
                "reparam.restart_every = 50: needs a low-rank product BA, which reparam.method=full does not have; set "
                "it to 0, or reparam.method=sltrain, lowrank or relora",
            ),
            (
                "reparam.restart_every=50 reparam.restart_warmup=50",
                "reparam.restart_warmup = 50: does not end before the next restart, so that the learning rate would "
                "never come back; set it below reparam.restart_every = 50, or restart less often",
            ),
            (
                "reparam.restart_every=50 reparam.restart_states=factors parallel.engine=zero",
                "reparam.restart_states = 'factors': cannot be factors with DeepSpeed, which counts the updates of all "
                "sharded parameters together; set it to all, or parallel.engine=fsdp or ddp",
            ),
        ],
    )
    def test_restarts(self, overrides: str, text: str) -> None:
        assert message(None, "train.steps=100", *overrides.split()) == f"command line: {text}"

    def test_factors_without_pairs(self) -> None:
        assert message(None, "train.steps=100", "optim.factors=spectron", "reparam.method=full") == (
            "command line: optim.factors = 'spectron': spectron updates pairs of B and A, which reparam.method=full "
            "does not have; set it to muon or adam, or reparam.method=sltrain or lowrank"
        )

    def test_long_values_are_cut(self) -> None:
        assert len(message(None, "train.steps=1", f"train.dtype={'x' * 5000}")) < 250

    def test_build_config_from_plain_values(self) -> None:
        with pytest.raises(ConfigError, match=r"^configuration: optim\.lr = -1: should be greater than 0$"):
            build_config({"optim": {"lr": -1}})

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (
                "train: {steps: 10}\ntrain: {steps: 11}\n",
                ": line 2, column 1: not valid YAML: the key 'train' is repeated",
            ),
            ("train: {steps: 10, steps: 11}", ": line 1, column 20: not valid YAML: the key 'steps' is repeated"),
            ("1: 2\n", ": line 1, column 1: not valid YAML: a key that is not text"),
            ("? [a]\n: 2\n", "a key that is not text"),
            ("train: [", "not valid YAML: while parsing a flow node"),
            ("x: !!python/object:os.system {}", "could not determine a constructor"),
            ("a: 1\n---\nb: 2\n", "expected a single document"),
            ("hello", ": a configuration is a mapping of sections, not 'hello'"),
            ("- a", ": a configuration is a mapping of sections, not ['a']"),
            ("train: 5", ": train = 5: this is a section; give it keys with values"),
        ],
    )
    def test_file(self, write: Callable[[str], Path], text: str, expected: str) -> None:
        path = write(text)
        # A wrong section in the file is the file's fault, also when an override would cover it.
        assert message(path, "train.steps=3").startswith(f"{path}: ")
        assert expected in message(path, "train.steps=3")

    def test_unreadable_file(self, tmp_path: Path) -> None:
        assert "cannot read the configuration" in message(tmp_path / "absent.yaml")
        assert "cannot read the configuration" in message(tmp_path)
        (tmp_path / "latin.yaml").write_bytes(b"run_dir: \xe9")
        assert "cannot read the configuration" in message(tmp_path / "latin.yaml")


class TestPresets:
    @pytest.mark.parametrize("name", sorted(PRESETS))
    def test_loads_alone_and_warns_of_nothing(self, name: str) -> None:
        config = load_config(None, [f"preset={name}"])
        assert config.preset == name
        assert list(check_fields(config)) == []
        assert list(without_effect(config)) == []
        for section, values in PRESETS[name].items():
            for key, value in values.items():
                assert getattr(getattr(config, section), key) == value

    # Table 1 and section 5.1 of arXiv 2406.02214 (millions of parameters, full rank and SLTrain).
    @pytest.mark.parametrize(
        ("name", "full", "sltrain"),
        [("llama_60m", 58, 44), ("llama_130m", 134, 97), ("llama_350m", 368, 194), ("llama_1b", 1339, 646)],
    )
    def test_parameters_are_the_papers(self, name: str, full: int, sltrain: int) -> None:
        for method, millions in (("full", full), ("sltrain", sltrain)):
            config = load_config(None, [f"preset={name}", f"reparam.method={method}"])
            assert count_parameters(config.model, config.reparam).total / 1e6 == pytest.approx(millions, rel=0.02)

    def test_the_file_wins_over_the_preset_key_by_key(self, write: Callable[[str], Path]) -> None:
        config = load_config(write("preset: llama_130m\noptim: {lr: 0.1}\nmodel:\n"), ["reparam.rank=64"])
        assert (config.optim.lr, config.optim.warmup_steps) == (0.1, 2_200)
        assert (config.model.hidden_size, config.reparam.rank, config.reparam.alpha) == (768, 64, 16.0)

    def test_a_null_takes_a_preset_value_away(self) -> None:
        config = load_config(None, ["preset=llama_60m", "train.steps=null", "train.tokens=1000"])
        assert (config.train.steps, config.train.tokens) == (None, 1000)

    def test_loading_changes_no_preset(self) -> None:
        before = repr(PRESETS)
        load_config(None, ["preset=llama_60m", "model.num_layers=1", "optim={lr: 0.5}"])
        assert repr(PRESETS) == before


class TestRules:
    @pytest.mark.parametrize(
        ("values", "key"),
        [
            ({"model": {"hidden_size": 513}}, "model.num_heads"),
            ({"model": {"hidden_size": 24, "num_heads": 8}, "reparam": {"rank": 4}}, "model.num_heads"),
            ({"model": {"num_heads": 8, "num_kv_heads": 3}}, "model.num_kv_heads"),
            ({"reparam": {"rank": 513}}, "reparam.rank"),
            ({"model": {"num_kv_heads": 2}, "reparam": {"rank": 129}}, "reparam.rank"),
            ({"reparam": {"density": 1e-7}}, "reparam.density"),
            ({"reparam": {"dense_layers": [8]}}, "reparam.dense_layers"),
            ({"reparam": {"dense_layers": [0, -9]}}, "reparam.dense_layers"),
            ({"reparam": {"dense_layers": [3, 0, 3]}}, "reparam.dense_layers"),
            ({"reparam": {"dense_layers": [0, -8]}}, "reparam.dense_layers"),
            ({"reparam": {"dense_layers": list(range(8))}}, "reparam.dense_layers"),
            ({"reparam": {"dense_layers": [0], "method": "full"}}, "reparam.dense_layers"),
            ({"reparam": {"restart_every": 5, "method": "full"}}, "reparam.restart_every"),
            ({"reparam": {"restart_every": 5, "restart_warmup": 5}}, "reparam.restart_warmup"),
            ({"reparam": {"restart_every": 5, "restart_warmup": 6}}, "reparam.restart_warmup"),
            (
                {"reparam": {"restart_every": 5, "restart_states": "factors"}, "parallel": {"engine": "zero"}},
                "reparam.restart_states",
            ),
            ({"reparam": {"method": "apollo-mini"}, "optim": {"name": "sgd"}}, "optim.name"),
            ({"reparam": {"method": "galore"}, "optim": {"name": "adam", "weight_decay": 0.1}}, "optim.weight_decay"),
            ({"reparam": {"method": "galore"}, "optim": {"master_weights": True}}, "optim.master_weights"),
            ({"reparam": {"method": "galore", "dense_layers": [0]}}, "reparam.dense_layers"),
            ({"reparam": {"method": "cola", "restart_every": 5}}, "reparam.restart_every"),
            ({"reparam": {"method": "full"}, "optim": {"factors": "spectron"}}, "optim.factors"),
            ({"reparam": {"method": "relora"}, "optim": {"factors": "muon"}}, "optim.factors"),
            ({"optim": {"factors": "muon", "name": "sgd"}}, "optim.name"),
            ({"optim": {"factors": "spectron", "update": "per_layer"}}, "optim.update"),
            ({"optim": {"factors": "muon"}, "reparam": {"weight_bits": 8}}, "reparam.weight_bits"),
            ({"train": {"steps": 1, "tokens": 1}}, "train.steps"),
            ({"train": {}}, "train.steps"),
            ({"optim": {"warmup_steps": 11}}, "optim.warmup_steps"),
            ({"optim": {"schedule": "wsd", "warmup_steps": 6, "decay_ratio": 0.5}}, "optim.decay_ratio"),
            ({"train": {"steps": 10, "micro_batch": 3}}, "train.micro_batch"),
            ({"parallel": {"accumulate": "sharded"}}, "parallel.accumulate"),
            ({"parallel": {"engine": "zero", "zero_stage": 1, "accumulate": "sharded"}}, "parallel.accumulate"),
            ({"parallel": {"engine": "zero", "zero_stage": 3, "accumulate": "local"}}, "parallel.accumulate"),
            ({"parallel": {"engine": "zero", "replicas": 2}}, "parallel.replicas"),
            ({"parallel": {"cpu_offload": True}}, "parallel.cpu_offload"),
            ({"parallel": {"engine": "zero", "cpu_offload": True}}, "parallel.cpu_offload"),  # in bf16
            ({"parallel": {"engine": "zero", "deepspeed": {"gradient_clipping": 1.0}}}, "parallel.deepspeed"),
            (
                {"parallel": {"engine": "zero", "deepspeed": {"zero_optimization": {"stage": 1}}}},
                "parallel.deepspeed",
            ),
            (
                {"parallel": {"engine": "zero", "deepspeed": {"bf16": {"enabled": False}}}},
                "parallel.deepspeed",
            ),
        ],
    )
    def test_broken(self, values: dict[str, Any], key: str) -> None:
        config = Config.model_validate({"train": {"steps": 10}} | values)
        assert [found for found, _ in check_fields(config)] == [key]

    @pytest.mark.parametrize(
        "values",
        [
            {"train": {"tokens": 5}},
            {"train": {"dry_run": True}},
            {"optim": {"warmup_steps": 10}},
            {"optim": {"schedule": "wsd", "warmup_steps": 5, "decay_ratio": 0.5}},
            {"reparam": {"dense_layers": [0, -1, 3]}},
            {"reparam": {"dense_layers": [0, 1, 2, 3, 4, 5, 6], "method": "lowrank"}},
            {"reparam": {"restart_every": 5, "restart_warmup": 4, "method": "lowrank"}, "parallel": {"engine": "zero"}},
            {"reparam": {"restart_every": 5, "restart_states": "factors"}, "parallel": {"engine": "fsdp"}},
            {"reparam": {"restart_every": 5, "weight_bits": 8, "dense_layers": [0]}, "optim": {"warmup_steps": 7}},
            {"reparam": {"method": "full"}, "optim": {"factors": "muon", "name": "adam"}},
            {"optim": {"factors": "spectron", "state_bits": 4}, "parallel": {"engine": "fsdp", "cpu_offload": True}},
            {"optim": {"schedule": "wsd", "warmup_steps": 1, "decay_ratio": 1.0}},
            {"optim": {"schedule": "wsd", "warmup_steps": 99, "decay_ratio": 0.5}, "train": {"tokens": 10}},
            {"reparam": {"rank": 512}},
            {"reparam": {"rank": 5000, "method": "full"}},
            {"reparam": {"density": 1e-7, "method": "lowrank"}},
            {"reparam": {"rank": 5000, "method": "apollo-mini"}},
            {"reparam": {"restart_every": 5, "method": "relora"}},
            {"reparam": {"method": "cola", "dense_layers": [0]}, "parallel": {"engine": "zero"}},
            {"reparam": {"method": "galore"}, "optim": {"state_bits": 8, "update": "per_layer", "name": "adam"}},
            {"train": {"steps": 10, "micro_batch": 512}},
            {"parallel": {"engine": "fsdp", "accumulate": "local", "replicas": 2, "cpu_offload": True}},
            {"parallel": {"engine": "zero", "zero_stage": 1, "accumulate": "local"}},
            {"parallel": {"engine": "zero", "deepspeed": {"zero_optimization": {"overlap_comm": True}}}},
        ],
    )
    def test_kept(self, values: dict[str, Any]) -> None:
        assert list(check_fields(Config.model_validate({"train": {"steps": 10}} | values))) == []

    @pytest.mark.parametrize(
        ("overrides", "says"),
        [
            ("reparam.method=relora", "'relora' never merges its factors with reparam.restart_every = 0"),
            ("reparam.method=relora reparam.restart_every=5 parallel.engine=zero", "'zero' shards the weights"),
            ("reparam.method=galore parallel.engine=fsdp", "'fsdp' shards the weights, which reparam.method=galore"),
            ("reparam.method=apollo-mini parallel.engine=zero", "set parallel.engine=ddp, or use another method"),
            ("reparam.method=relora reparam.restart_every=5", None),
            ("reparam.method=galore", None),
            ("reparam.method=cola parallel.engine=zero", None),
        ],
    )
    def test_methods_that_cannot_be_trained_so(self, overrides: str, says: str | None) -> None:
        """They are loaded: the paper's accounting has these methods, whatever the engine."""
        config = load_config(None, ["train.steps=1", *overrides.split()])
        with nullcontext() if says is None else pytest.raises(ConfigError, match=says):
            check_trainable(config)

    def test_micro_batches_per_update(self) -> None:
        config = load_config(None, ["train.steps=1", "train.micro_batch=8", "train.global_batch=96"])
        assert [micro_batches_per_update(config, ranks) for ranks in (1, 2, 3, 12)] == [12, 6, 4, 1]
        with pytest.raises(ConfigError, match=r"8 times 5 ranks = 40; .* train\.global_batch=120, or another number"):
            micro_batches_per_update(config, 5)
        with pytest.raises(ConfigError, match=r"8 times 16 ranks = 128; set for example train\.micro_batch=2$"):
            micro_batches_per_update(config, 16)

    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            ((), []),
            (("reparam.method=full",), []),
            (("reparam.method=full", "reparam.rank=8"), ["reparam.rank has no effect with reparam.method=full"]),
            (("reparam.method=full", "preset=llama_130m"), []),
            (
                ("reparam.method=lowrank", "reparam.density=0.5"),
                ["reparam.density has no effect with reparam.method=lowrank"],
            ),
            (
                ("reparam.method=apollo-mini", "reparam.rank=8", "optim.projection_every=5"),
                ["reparam.rank has no effect with reparam.method=apollo-mini"],
            ),
            (
                ("reparam.method=cola", "reparam.alpha=8.0", "optim.projection_every=5"),
                [
                    "reparam.alpha has no effect with reparam.method=cola",
                    "optim.projection_every has no effect with reparam.method=cola",
                ],
            ),
            (("parallel.zero_stage=1",), ["parallel.zero_stage has no effect with parallel.engine=ddp"]),
            (("parallel.zero_stage=1", "parallel.engine=zero"), []),
            (
                ("parallel.zero_stage=1", "parallel.engine=fsdp"),
                ["parallel.zero_stage has no effect with parallel.engine=fsdp"],
            ),
            (
                ("parallel.prefetch_blocks=2", "parallel.engine=zero"),
                ["parallel.prefetch_blocks has no effect with parallel.engine=zero"],
            ),
            (("parallel.prefetch_blocks=2", "parallel.engine=zero", "parallel.zero_stage=3"), []),
            (
                ("parallel.deepspeed.zero_optimization.overlap_comm=true",),
                ["parallel.deepspeed has no effect with parallel.engine=ddp"],
            ),
            (
                ("train.checkpoint_every=4",),
                ["train.checkpoint_every has no effect with train.activation_checkpointing=none"],
            ),
            (
                (
                    "train.activation_checkpointing=selective",
                    "train.checkpoint_policy=attention",
                    "train.checkpoint_every=4",
                ),
                ["train.checkpoint_every has no effect with train.checkpoint_policy=attention"],
            ),
            (
                (
                    "train.activation_checkpointing=selective",
                    "train.checkpoint_policy=ops",
                    "train.checkpoint_every=4",
                ),
                ["train.checkpoint_every has no effect with train.checkpoint_policy=ops"],
            ),
            (("eval.every=5",), ["eval.every has no effect with eval.source=null"]),
            (("eval.samples=[a]",), ["eval.samples has no effect with eval.source=null"]),
            (
                ("eval.sample_tokens=5", "eval.source=embedded"),
                ["eval.sample_tokens has no effect with eval.samples=[]"],
            ),
            (("eval.every=5", "eval.source=embedded"), []),
            (("optim.name=sgd", "optim.beta2=0.5"), ["optim.beta2 has no effect with optim.name=sgd"]),
            (
                ("optim.schedule=constant", "optim.min_lr_ratio=0"),
                ["optim.min_lr_ratio has no effect with optim.schedule=constant"],
            ),
            (
                ("optim.schedule=linear", "optim.decay_ratio=0.1", "optim.decay_type=cosine"),
                [f"optim.{key} has no effect with optim.schedule=linear" for key in ("decay_ratio", "decay_type")],
            ),
            (("optim.schedule=wsd", "optim.decay_ratio=0.1", "optim.decay_type=linear"), []),
            (
                ("optim.factors_lr_ratio=2", "optim.momentum=0.9", "optim.newton_schulz=fp32"),
                [
                    f"optim.{key} has no effect with optim.factors=adam"
                    for key in ("factors_lr_ratio", "momentum", "newton_schulz")
                ],
            ),
            (("optim.factors=muon", "optim.factors_lr_ratio=2", "optim.momentum=0.9"), []),
            (
                ("preset=llama_7b", "reparam.method=full", "reparam.rank=8"),
                ["reparam.rank has no effect with reparam.method=full"],
            ),
            (
                ("reparam.restart_warmup=9", "reparam.restart_states=factors"),
                [
                    f"reparam.{key} has no effect with reparam.restart_every=0"
                    for key in ("restart_warmup", "restart_states")
                ],
            ),
            (
                ("tracking.mlflow=false", "tracking.mlflow_uri=http://h"),
                ["tracking.mlflow_uri has no effect with tracking.mlflow=false"],
            ),
        ],
    )
    def test_warnings_of_settings_without_effect(self, overrides: tuple[str, ...], expected: list[str]) -> None:
        assert list(without_effect(load_config(None, ["train.steps=1000000", *overrides]))) == expected
