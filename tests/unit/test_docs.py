"""Commands in README.md name things that exist; shipped configurations load."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sltrain_dist import cli
from sltrain_dist.config.load import load_config
from tests.support.paths import REPO

README = (REPO / "README.md").read_text().replace("\\\n", "")  # a command that goes on in the next line is one
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip() and not line.startswith("#")]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command(command: str) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "bash":
        assert (REPO / words[1]).is_file()
    elif words[0] == "sltrain":
        assert words[1] in {registered.name for registered in cli.app.registered_commands}
    else:
        assert words[0] in {"deepspeed", "python", "sbatch", "torchrun"}
        script = "launch/slurm/pretrain.sbatch" if words[0] == "sbatch" else "launch/pretrain.py"
        assert script in words
        assert (REPO / script).is_file()
        overrides = [word for word in words if "=" in word and not word.startswith("--")]
        load_config(REPO / words[words.index("--config") + 1], overrides)


@pytest.mark.parametrize("path", sorted(REPO.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_shipped_configuration(path: Path) -> None:
    config = load_config(path)
    load_config(path, ["reparam.method=full"])
    if config.preset is not None:
        assert path.stem == config.preset


def test_no_link_is_dead() -> None:
    for page in (REPO / "README.md", REPO / "CHANGELOG.md", *REPO.glob("docs/**/*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
