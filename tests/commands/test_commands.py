"""The command `lape-ray`: its subcommands are the jobs, its help is instant, and a shell completes it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from lape_ray.cli import typed_command
from lape_ray.commands import main as console
from lape_ray.commands.main import SUBCOMMANDS, subcommand
from lape_ray.config import Join
from lape_ray.recipes import RECIPES

ROOT = Path(__file__).parent.parent.parent
JOBS = {
    "train": "imagenet_deit", "tune": "tune_position", "write-data": "write_beton", "evaluate": "evaluate",
    "predict": "predict", "export": "export", "report": "position_report", "demo": "demo",
}  # fmt: skip


def test_the_package_has_the_console_command() -> None:
    (entry,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items()
    assert entry == ("lape-ray", "lape_ray.commands.main:run")
    assert callable(console.run)


def test_every_job_is_a_subcommand() -> None:
    assert {*JOBS, "doctor"} == set(SUBCOMMANDS)
    assert {f"{job}.py" for job in JOBS.values()} == {path.name for path in (ROOT / "jobs").glob("*.py")}
    for name, job in JOBS.items():
        spec = importlib.util.spec_from_file_location(job, ROOT / "jobs" / f"{job}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert getattr(module.main, "func", module.main) is subcommand(name).main


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_imports_nothing_heavy(name: str) -> None:
    code = (
        "import sys; sys.argv = ['lape-ray', sys.argv[1], '--help']\n"
        "from lape_ray.commands.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'numpy', 'torch', 'ray', 'mlflow', 'boto3', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: lape-ray {name} " in done.stdout


def test_without_a_known_subcommand_the_console_says_which_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words, code in (([], 0), (["--help"], 0), (["trian"], 2)):
        with pytest.raises(SystemExit) as end:
            console.main(words)
        assert end.value.code == code
        captured = capsys.readouterr()
        said = captured.out + captured.err
        assert all(name in said for name in SUBCOMMANDS)


def test_options_are_those_of_the_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        console.main(["train", "demo", "--optim.epochs", "7", "--dump"])
    assert end.value.code == 0
    assert "optim.epochs = 7\n" in capsys.readouterr().out


def test_a_run_remembers_the_command_that_a_person_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/lape-ray", "train", "demo", "--run.name", "a b"])
    assert typed_command() == "lape-ray train demo --run.name 'a b'"
    monkeypatch.setattr(sys, "argv", ["jobs/imagenet_deit.py", "demo"])
    assert typed_command() == "python jobs/imagenet_deit.py demo"


COMPLETE = """
source "$1"
COMP_WORDS=(lape-ray "${@:2}")
COMP_CWORD=$(($# - 1))
_lape_ray
echo "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    code = "from lape_ray.commands.main import main; main(['--completion', 'bash'])"
    path = tmp_path_factory.mktemp("completion") / "lape-ray"
    path.write_bytes(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)
    return path


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers for the last word, without any program to start."""
    command = ["/bin/bash", "-c", COMPLETE, "bash", str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": ""})
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash_completes(bash_script: Path) -> None:
    assert completed(bash_script, "") >= {*SUBCOMMANDS}
    assert completed(bash_script, "tr") == {"train"}
    assert completed(bash_script, "train", "deit_") == {name for name in RECIPES if name.startswith("deit_")}
    assert completed(bash_script, "train", "demo", "--model.jo") == {"--model.join"}
    assert completed(bash_script, "train", "demo", "--model.join", "") == {*get_args(Join)}
    assert completed(bash_script, "train", "demo", "--run.overwrite", "") == {"true", "false"}
    assert completed(bash_script, "tune", "joins", "demo", "--sample", "") == {"grid", "random", "tpe"}
    assert completed(bash_script, "evaluate", "x.pth", "--recipe", "demo") == {
        name for name in RECIPES if name.startswith("demo")
    }
    assert "--max-size" in completed(bash_script, "write-data", "--m")
    assert completed(bash_script, "export", "--tim") == {"--timm"}


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_zsh_takes_the_script(tmp_path: Path) -> None:
    code = "from lape_ray.commands.main import main; main(['--completion=zsh'])"
    script = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True
    ).stdout
    (tmp_path / "lape-ray").write_text(script)
    command = "autoload -Uz compinit && compinit -u -D; source $1; print -- $_comps[lape-ray]"
    done = subprocess.run(
        ["zsh", "-fc", command, "zsh", tmp_path / "lape-ray"],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert "_bash_complete" in done.stdout, done.stderr
