"""How runs end, what they leave behind, and where the next one begins."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from sltrain_dist.parallel.ddp import DDPEngine
from sltrain_dist.parallel.engine import Engine
from sltrain_dist.train import build, dry_run, loop, run_directory
from sltrain_dist.train.run_directory import RunDirectory
from tests.support.runs import final_tensors, last_step, metrics, outcome, saved_steps, train_here, trajectory

Output = pytest.CaptureFixture[str]


@pytest.fixture
def used(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run: 6 updates, checkpoints after 2, 4 and 6."""
    return Path(shutil.copytree(finished, tmp_path / "used"))


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def test_a_finished_run(finished: Path, tiny: Path) -> None:
    lines = metrics(finished)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    always = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "data_wait_s", "elapsed_s"}
    always |= {"peak_memory_bytes", "predicted_memory_bytes"}
    assert all(always == line.keys() - {"observed_memory_bytes"} for line in training)
    assert ["observed_memory_bytes" in line for line in training] == [False, False, True, True, True, True]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    assert all({"step", "eval_loss", "eval_perplexity", "eval_tokens"} == line.keys() for line in evaluations)
    assert len({line["eval_tokens"] for line in evaluations}) == 1
    assert outcome(finished) == {"code": 0, "reason": "done", "step": 6}
    assert saved_steps(finished) == [2, 4, 6]
    saved = yaml.safe_load((finished / "config.yaml").read_text())
    assert saved["model"]["hidden_size"] == yaml.safe_load(tiny.read_text())["model"]["hidden_size"]
    assert saved["optim"]["beta2"] == 0.999, "the resolved configuration has the defaults written out"
    assert {path.name for path in finished.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "exit.json",
        "log.txt",
        "metrics.jsonl",
    }


def test_rerun_of_a_finished_run_has_nothing_to_do(used: Path, tiny: Path, capsys: Output) -> None:
    before = trajectory(used)
    assert train_here(tiny, used) == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert (outcome(used)["code"], outcome(used)["step"]) == (0, 6)
    assert trajectory(used) == before


def test_more_steps_go_on_from_a_finished_run(used: Path, tiny: Path) -> None:
    assert train_here(tiny, used, "train.steps=7", "optim.schedule=constant") == 0
    assert [line["step"] for line in metrics(used) if "loss" in line] == [1, 2, 3, 4, 5, 6, 7]
    assert saved_steps(used) == [4, 6, 7]
    log = (used / "log.txt").read_text()
    assert "changed since then: train.steps: 6 → 7" in log
    assert "changed since then: optim.schedule: 'cosine' → 'constant'" in log


def test_a_stable_run_decays_from_any_of_its_checkpoints(tiny: Path, tmp_path: Path, capsys: Output) -> None:
    """The decay begins after update 4 of 10, in a run whose own decay would begin after update 12."""
    wsd = ("optim.schedule=wsd", "optim.decay_ratio=0.5", "eval.source=null", "checkpoint.keep=9")
    assert train_here(tiny, tmp_path / "at once", *wsd, "train.steps=10") == 0
    assert train_here(tiny, tmp_path / "run", *wsd, "train.steps=14", "optim.decay_ratio=0.1") == 0
    last = capsys.readouterr().out
    assert "checkpoint.resume=PATH, a checkpoint from before the decay" in last
    assert "(wsd with a 1-sqrt decay over the last 10%, 2 warm-up)" in last
    stable = f"checkpoint.resume={checkpoint(tmp_path / 'run', 4)}"
    assert train_here(tiny, tmp_path / "decay", *wsd, "train.steps=10", stable) == 0
    assert trajectory(tmp_path / "decay") == trajectory(tmp_path / "at once")[4:]
    assert final_tensors(tmp_path / "decay") == final_tensors(tmp_path / "at once")
    lr = [line["lr"] for line in trajectory(tmp_path / "at once")]
    assert lr[1:5] == [0.01] * 4
    assert lr[5] < 0.01
    capsys.readouterr()
    assert train_here(tiny, tmp_path / "early", *wsd, "train.steps=8", stable) == 5
    assert "where this configuration's decay has begun" in capsys.readouterr().err
    # The finished run has decayed, and goes on only with its own schedule.
    assert train_here(tiny, tmp_path / "run", *wsd, "train.steps=20") == 5
    assert "where that run's decay has begun" in capsys.readouterr().err
    assert train_here(tiny, tmp_path / "run", *wsd, "train.steps=10", stable) == 0
    assert final_tensors(tmp_path / "run") == final_tensors(tmp_path / "at once")


def test_a_model_with_dense_layers_goes_on_to_the_bit(tiny: Path, tmp_path: Path, capsys: Output) -> None:
    settings = ("reparam.dense_layers=[0]", "optim.schedule=constant", "train.steps=5")
    assert train_here(tiny, tmp_path / "whole", *settings) == 0
    assert train_here(tiny, tmp_path / "parts", *settings, "train.steps=2") == 0
    assert train_here(tiny, tmp_path / "parts", *settings, "reparam.dense_layers=[1]") == 5
    assert "reparam.dense_layers: [0] → [1]" in capsys.readouterr().err
    assert train_here(tiny, tmp_path / "parts", *settings) == 0
    of_model = [[line for line in trajectory(tmp_path / run) if "loss" in line] for run in ("whole", "parts")]
    assert of_model[0] == of_model[1]
    assert final_tensors(tmp_path / "parts") == final_tensors(tmp_path / "whole")
    names = {name.removeprefix("model.model.layers.") for name in final_tensors(tmp_path / "whole")}
    assert {"0.mlp.up_proj.weight", "1.mlp.up_proj.B"} <= names
    assert not {"0.mlp.up_proj.B", "1.mlp.up_proj.weight"} & names


def test_token_budget_ends_with_the_update_that_reaches_it(finished: Path, tiny: Path, tmp_path: Path) -> None:
    tokens = [line["tokens"] for line in metrics(finished) if "tokens" in line]
    budget = tokens[3] + 1
    assert train_here(tiny, tmp_path / "run", "train.steps=null", f"train.tokens={budget}") == 0
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [line["tokens"] for line in lines] == tokens[:5]
    assert tokens[3] < budget <= tokens[4]
    assert saved_steps(tmp_path / "run")[-1] == 5


def test_only_the_newest_checkpoints_are_kept(tiny: Path, tmp_path: Path) -> None:
    overrides = ("train.steps=5", "checkpoint.every=1", "checkpoint.keep=2", "eval.source=null")
    assert train_here(tiny, tmp_path, *overrides) == 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000004", "step_00000005"]


def test_no_checkpoint_but_the_last(tiny: Path, tmp_path: Path) -> None:
    assert train_here(tiny, tmp_path, "train.steps=3", "checkpoint.every=0", "eval.every=0") == 0
    assert saved_steps(tmp_path) == [3]
    assert [line["step"] for line in metrics(tmp_path) if "eval_loss" in line] == [0, 3]


def test_stop_file(finished: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first update nothing is lost; later the update is finished and saved."""
    make_update = loop._update

    def update_and_ask(run: build.Run, clock: loop.Clock) -> None:
        make_update(run, clock)
        (tmp_path / "STOP").touch()

    (tmp_path / "STOP").touch()
    for steps in ([], [1]):
        assert train_here(tiny, tmp_path) == 75
        assert not (tmp_path / "STOP").exists()
        assert saved_steps(tmp_path) == steps
        ended = outcome(tmp_path)
        assert (ended["code"], ended["step"]) == (75, len(steps))
        assert "STOP" in ended["reason"]
        monkeypatch.setattr(loop, "_update", update_and_ask)
    monkeypatch.setattr(loop, "_update", make_update)
    assert train_here(tiny, tmp_path) == 0
    assert trajectory(tmp_path) == trajectory(finished)
    assert final_tensors(tmp_path) == final_tensors(finished)


@pytest.mark.parametrize("step", [0, 3, 6])
def test_stop_during_an_evaluation(
    finished: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """It is cut short, after the update before it was saved, and is made when the run goes on; the last one as well."""
    evaluate, batches = DDPEngine.evaluate, []

    def evaluate_and_ask(engine: DDPEngine, *batch: torch.Tensor | None) -> torch.Tensor:
        if last_step(tmp_path) == step:
            batches.append(step)
            signal.raise_signal(signal.SIGTERM)
        return evaluate(engine, *batch)

    monkeypatch.setattr(DDPEngine, "evaluate", evaluate_and_ask)
    assert train_here(tiny, tmp_path) == 75
    looked = [step] if step == 3 else []  # at the weights, before they are saved; of the others they are saved already
    assert batches == [step, *looked], "the evaluation went on"
    assert saved_steps(tmp_path) == sorted({2, 4, 6, step} - {0, *range(step + 1, 7)})
    assert outcome(tmp_path) == {
        "code": 75,
        "reason": "stopped early with everything saved: received SIGTERM",
        "step": step,
    }
    assert [line["step"] for line in metrics(tmp_path) if "eval_loss" in line] == list(range(0, step, 3))
    monkeypatch.setattr(DDPEngine, "evaluate", evaluate)
    assert train_here(tiny, tmp_path) == 0
    assert trajectory(tmp_path) == trajectory(finished)
    assert final_tensors(tmp_path) == final_tensors(finished)
    assert train_here(tiny, tmp_path) == 0
    assert outcome(tmp_path)["reason"].startswith("nothing left to do")


def test_going_back_sets_later_checkpoints_aside(used: Path, tiny: Path) -> None:
    """Otherwise the next start would go on from the newest, which belongs to what was given up."""
    back = ("train.steps=3", f"checkpoint.resume={checkpoint(used, 2)}", "optim.lr=0.005")
    assert train_here(tiny, used, *back) == 0
    assert saved_steps(used) == [2, 3]
    aside = sorted(path.name.rpartition("-")[0] for path in (used / "checkpoints").glob("abandoned-*"))
    assert aside == ["abandoned-step_00000004", "abandoned-step_00000006"]
    assert train_here(tiny, used, "optim.lr=0.005") == 0
    lines = metrics(used)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in lines if "loss" in line][3] < 0.005
    assert "resumed from" in (used / "log.txt").read_text().rpartition("Model")[2]


def test_a_run_that_begins_from_anothers_checkpoint(finished: Path, tiny: Path, tmp_path: Path) -> None:
    """Started again, it goes on from its own checkpoints, as a requeued job must."""
    branch = (f"checkpoint.resume={checkpoint(finished, 2)}", "train.steps=6")
    run_dir = tmp_path / "branch"
    assert train_here(tiny, run_dir, *branch, "checkpoint.every=1", "checkpoint.keep=9") == 0
    assert saved_steps(run_dir) == [3, 4, 5, 6]
    assert final_tensors(run_dir) == final_tensors(finished)
    assert saved_steps(finished) == [2, 4, 6]
    assert train_here(tiny, run_dir, *branch) == 0
    assert outcome(run_dir)["reason"].startswith("nothing left to do")


def test_a_run_directory_serves_one_run_at_a_time(tiny: Path, tmp_path: Path, capsys: Output) -> None:
    run_dir = tmp_path / "run"
    other = RunDirectory(run_dir)
    other.claim()
    try:
        assert train_here(tiny, run_dir) == 2
        assert "is in use by another run" in capsys.readouterr().err
        assert train_here(tiny, run_dir, "optim.lrr=1") == 2
        assert outcome(run_dir)["code"] is None, "the run that goes on has not ended"
    finally:
        other.release()
    assert train_here(tiny, run_dir, "optim.lrr=1") == 2
    assert outcome(run_dir)["code"] == 2
    assert train_here(tiny, run_dir, "train.steps=2") == 0
    assert outcome(run_dir)["code"] == 0


def test_a_start_on_a_full_disk_does_not_hold_the_directory(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_directory, "write_whole", full)
    for _ in range(2):
        assert train_here(tiny, tmp_path / "run") == 6
        assert "run cannot be written (No space left on device)" in capsys.readouterr().err


def test_dry_run_measures_with_the_optimizers_states(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward_backward = dry_run.forward_backward
    states: list[int] = []

    def counting(engine: Engine, *arguments: object, **settings: object) -> tuple[float, int]:
        states.append(len(engine.tensors()["states"]))
        return forward_backward(engine, *arguments, **settings)

    monkeypatch.setattr(dry_run, "forward_backward", counting)
    assert train_here(tiny, tmp_path, "train.dry_run=true") == 0
    assert states[0] == 0
    assert states[-1] > 0


def test_dry_run_leaves_no_trace_but_its_exit_code(used: Path, tiny: Path, capsys: Output) -> None:
    def snapshot() -> dict[Path, bytes]:
        files = [path for path in used.rglob("*") if path.is_file() and "dry_run" not in path.parts]
        return {path: path.read_bytes() for path in files}

    before = snapshot()
    assert train_here(tiny, used, "train.dry_run=true") == 0
    assert snapshot() == before
    assert [path.name for path in (used / "dry_run").iterdir()] == ["exit.json"]
    said = outcome(used / "dry_run")
    assert said["code"] == 0
    assert "peak memory" in said["reason"]
    printed = capsys.readouterr().out
    assert "peak memory (resident, with libraries), largest of 1 ranks: " in printed
    assert "one update on 192 made-up tokens" in printed


def test_utilisation_is_reported_where_the_peak_is_known(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_peak_flops", lambda run: 1e9)
    assert train_here(tiny, tmp_path, "train.steps=2", "data.batching=pack", "eval.source=null") == 0
    first, second = metrics(tmp_path)
    # Packed rows have no padding, so that all slots are tokens. 6 FLOPs a token for each weight of the linear
    # layers and of the head, and 12 · layers · width · length for attention.
    flops_per_token = 6 * (2 * (4 * 32 * 32 + 3 * 32 * 44) + 320 * 32) + 12 * 2 * 32 * 24
    for line in (first, second):
        assert line["mfu"] == pytest.approx(line["tokens_per_s"] * flops_per_token / 1e9)


def test_a_save_that_cannot_be_written(finished: Path, tiny: Path, tmp_path: Path, capsys: Output) -> None:
    """Exit code 6. It leaves nothing, and the same command goes on as if nothing had been, once there is space."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert train_here(tiny, tmp_path, "train.steps=2") == 0
    (tmp_path / "checkpoints" / ".incomplete-step_00000006").touch()
    for _ in range(2):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # less than the tensors take
        try:
            assert train_here(tiny, tmp_path) == 6
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        error = capsys.readouterr().err
        assert f"error: the checkpoint in {tmp_path}/checkpoints cannot be written (" in error
        assert "free space or quota" in error
        assert "Traceback" not in error
        assert (outcome(tmp_path)["code"], outcome(tmp_path)["step"]) == (6, 2)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    assert train_here(tiny, tmp_path) == 0
    assert final_tensors(tmp_path) == final_tensors(finished)


def test_a_run_directory_that_is_deleted_while_the_run_goes_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    """It is said, and what follows is written anew."""
    make_update, run_dir = loop._update, tmp_path / "run"

    def update_and_delete(run: build.Run, clock: loop.Clock) -> None:
        if run.state.step == 3:
            shutil.rmtree(run_dir)
        make_update(run, clock)

    monkeypatch.setattr(loop, "_update", update_and_delete)
    assert train_here(tiny, run_dir, "eval.source=null") == 0
    said = f"warning: {run_dir}/metrics.jsonl has been deleted or replaced: its lines before update 4 are lost"
    assert capsys.readouterr().out.count(said) == 1
    assert said in (run_dir / "log.txt").read_text()
    assert [line["step"] for line in metrics(run_dir)] == [4, 5, 6]
    assert saved_steps(run_dir) == [4, 6]
    assert outcome(run_dir)["code"] == 0


def test_metrics_are_on_the_disk_before_the_checkpoint_is(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut the metrics may not end before the newest checkpoint."""
    order: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def syncing(descriptor: int) -> None:
        order.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def renaming(path: Path, target: Path) -> Path:
        order.append(f"→ {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "rename", renaming)
    assert train_here(tiny, tmp_path / "run", "train.steps=2", "eval.source=null") == 0
    saved = order.index("→ step_00000002")
    assert {"metrics.jsonl", "log.txt", "state.json", "tokenizer.model", "config.yaml"} <= set(order[:saved])
    assert "tensors-00000-of-00001.safetensors" in order[:saved]
    assert order[saved - 1].startswith(".incomplete-step_00000002"), "the names of its files"
    assert order[saved + 1] == "checkpoints", "its own name"
    assert {"run", tmp_path.name} <= set(order[:saved]), "the directories that it is in"
    assert any(name.startswith(".exit.json") for name in order[saved:])


class TestResume:
    def test_never_refuses_a_used_run_dir(self, used: Path, tiny: Path, capsys: Output) -> None:
        before = trajectory(used)
        assert train_here(tiny, used, "checkpoint.resume=never") == 5
        assert outcome(used)["code"] == 5
        assert trajectory(used) == before
        error = capsys.readouterr().err
        assert "checkpoint.resume=never" in error
        assert str(used) in error

    def test_never_starts_in_a_new_one(self, tiny: Path, tmp_path: Path, finished: Path) -> None:
        assert train_here(tiny, tmp_path, "checkpoint.resume=never") == 0
        assert trajectory(tmp_path) == trajectory(finished)

    @pytest.mark.parametrize("named", [lambda run_dir: run_dir, lambda run_dir: checkpoint(run_dir, 4)])
    def test_path_of_a_run_or_of_a_checkpoint(
        self, finished: Path, used: Path, tiny: Path, tmp_path: Path, named: Callable[[Path], Path]
    ) -> None:
        shutil.rmtree(checkpoint(used, 6))
        assert train_here(tiny, tmp_path / "new", f"checkpoint.resume={named(used)}") == 0
        assert trajectory(tmp_path / "new") == [line for line in trajectory(finished) if line["step"] > 4]
        assert final_tensors(tmp_path / "new") == final_tensors(finished)
        assert saved_steps(used) == [2, 4]

    def test_path_of_neither(self, tiny: Path, tmp_path: Path, capsys: Output) -> None:
        assert train_here(tiny, tmp_path / "new", f"checkpoint.resume={tmp_path}/old") == 5
        assert f"checkpoint.resume = {tmp_path}/old: " in capsys.readouterr().err

    def test_another_configuration(self, used: Path, tiny: Path, capsys: Output) -> None:
        assert train_here(tiny, used, "model.num_layers=1", "seed=4", "train.micro_batch=2") == 5
        error = capsys.readouterr().err
        assert "model.num_layers: 2 → 1" in error
        assert "seed: 3 → 4" in error
        assert "micro_batch" not in error
        assert "set these back, or use another run_dir" in error
        assert outcome(used)["code"] == 5

    def test_another_data_order(self, used: Path, tiny: Path, capsys: Output) -> None:
        assert train_here(tiny, used, "train.steps=7", "data.batching=pack", "data.shuffle_block=8") == 5
        error = capsys.readouterr().err
        assert "data.batching ('pad', now 'pack')" in error
        assert "data.shuffle_block (16, now 8)" in error


class TestDamage:
    """The newest checkpoint is damaged: it is named and passed over, and the run ends as it should have."""

    def damage_one(self, directory: Path, kind: str) -> str:
        tensors = next(directory.glob("*.safetensors"))
        content = tensors.read_bytes()
        if kind == "truncated":
            tensors.write_bytes(content[:-1])
        elif kind == "flipped":
            tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif kind == "missing":
            tensors.unlink()
        elif kind == "no manifest":
            (directory / "manifest.json").unlink()
            return str(directory)
        else:
            (directory / "manifest.json").write_text('{"format": 1, "st')
            return str(directory / "manifest.json")
        return str(tensors)

    @pytest.mark.parametrize("kind", ["truncated", "flipped", "missing", "no manifest", "half a manifest"])
    def test_newest(self, finished: Path, used: Path, tiny: Path, kind: str, capsys: Output) -> None:
        named = self.damage_one(checkpoint(used, 6), kind)
        assert train_here(tiny, used) == 0
        printed = capsys.readouterr().out
        assert f"checkpoint skipped: {named}" in printed
        assert f"resumed from {checkpoint(used, 4)}" in printed
        assert f"checkpoint skipped: {named}" in (used / "log.txt").read_text()
        assert trajectory(used) == trajectory(finished)
        assert final_tensors(used) == final_tensors(finished), "the damaged one was replaced"

    def test_all(self, used: Path, tiny: Path, capsys: Output) -> None:
        before = trajectory(used)
        for step, kind in ((2, "truncated"), (4, "no manifest"), (6, "flipped")):
            self.damage_one(checkpoint(used, step), kind)
        assert train_here(tiny, used) == 5
        captured = capsys.readouterr()
        assert captured.out.count("checkpoint skipped") == 3
        assert "every checkpoint" in captured.err
        assert "new run_dir" in captured.err
        assert outcome(used)["code"] == 5
        assert trajectory(used) == before
