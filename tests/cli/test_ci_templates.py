"""The templates for CI: their commands exist with these options, in an order that signs last."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CI = ROOT / "examples" / "ci"
# Parses a command line as `dverge` does, and runs nothing.
PARSES = """#!{python}
import sys
sys.path.insert(0, {root!r})
import typer
from dverge_serve import cli
from dverge_serve.cli import train, export, verify, serve, predict, card, sign  # noqa: F401
name, *arguments = sys.argv[1:]
command = typer.main.get_command(cli.app).commands[name]
command.make_context(name, list(arguments))
print(name, *arguments, file=open("commands", "a"))
if name == "verify-robustness":
    sys.exit({verdict})
"""


def released(folder: Path, verdict: int = 0, **variables: str) -> tuple[int, list[str]]:
    """Run the script with a `dverge` that only parses; return its exit code and the commands."""
    program = folder / "bin" / "dverge"
    program.parent.mkdir(exist_ok=True)
    program.write_text(PARSES.format(python=sys.executable, root=str(ROOT), verdict=verdict))
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    (folder / "commands").unlink(missing_ok=True)
    done = subprocess.run(
        ["sh", str(CI / "release.sh")],
        cwd=folder,
        env=os.environ | {"PATH": path} | variables,
        check=False,
    )
    return done.returncode, (folder / "commands").read_text().splitlines()


@pytest.mark.skipif(shutil.which("sh") is None, reason="no POSIX shell")
def test_the_script_trains_verifies_and_signs_last(tmp_path: Path) -> None:
    code, commands = released(tmp_path, SIGNING_KEY="key.pem", PUBLIC_KEY="key.pub")
    assert code == 0
    names = ["train", "export", "verify-robustness", "card", "sign", "verify-signature"]
    assert [command.split()[0] for command in commands] == names
    assert "--min-accuracy 0.6 --at-eps 0.1" in commands[2]
    code, commands = released(tmp_path)
    assert (code, commands[-1]) == (0, "sign release/model.onnx --sigstore")
    code, commands = released(tmp_path, verdict=3)
    assert code == 3
    assert commands[-1].startswith("verify-robustness")  # nothing is signed


def test_the_templates_are_yaml_and_set_what_the_script_reads() -> None:
    script = (CI / "release.sh").read_text()
    github = yaml.safe_load((CI / "github.yml").read_text())["jobs"]["release"]
    gitlab = yaml.safe_load((CI / "gitlab-ci.yml").read_text())["model"]
    for variables in (github["env"], gitlab["variables"]):
        assert all(f"${{{name}:-" in script for name in variables if name != "DVERGE_CACHE")
    used = {step["uses"]: step for step in github["steps"] if "uses" in step}
    restored, saved = (used[f"actions/cache/{what}@v4"] for what in ("restore", "save"))
    assert saved["if"] == "always()"
    assert saved["with"].items() <= restored["with"].items()
    assert saved["with"]["key"].startswith(restored["with"]["restore-keys"])
    assert gitlab["cache"]["when"] == "always"
    runs = [step["run"] for step in github["steps"] if "run" in step]
    assert runs == gitlab["script"]
    assert (ROOT / runs[-1].split()[-1]).is_file()
