"""The command line as a shell sees it: statuses, streams, and no traceback for what is the user's to fix."""

from __future__ import annotations

import resource
import sys

import pytest

from conftest import SCRIPT
from memfit.cli import main


def test_help_answers_at_once(shell):
    """Under 0.3 s; processor time and the best of three, since the machine may be busy."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = shell.memfit("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
        assert all(verb in done.stdout for verb in ("run", "plan", "doctor"))
    assert min(seconds) < 0.3


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("memfit 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: VERB"),
        (["frobnicate"], "invalid choice"),
        (["run"], "No script to run"),
        (["run", "--"], "No script to run"),
        (["run", "--", "-m"], "`-m` needs the name of a module"),
        (["run", "--", "--budget", "6GiB"], "Options of Memfit come before the `--`"),
        (["run", "--", "absent.py"], "There is no file `absent.py`"),
        (["run", "--budget", "6G", "--", "train.py"], "could be two sizes"),
        (["run", "--budget", "nan", "--", "train.py"], "`nan` is not a size"),
        (["run", "--budget", "1GiB", "--policy", "full", "--", "train.py"], "not allowed with"),
        (["run", "--policy", "half", "--", "train.py"], "invalid choice"),
        (["run", "--every-n-layers", "0", "--", "train.py"], "is below 1"),
        (["run", "--plan", "absent.json", "--", "train.py"], "absent.json"),
        (["run", "--report", "absent/report.json", "--", "train.py"], "There is no folder `absent`"),
        (["plan", "train.py"], "write `train.py:build`"),
        (["plan", "absent.py:build"], "There is no file `absent.py`"),
        (["plan", "absent_module:build"], "There is no module `absent_module`"),
        (["plan", "train.py:absent"], "has no function `absent`"),
        (["plan", "train.py:number"], "has no function `number`"),
        (["plan", "train.py:build"], "return (model, batch)"),
        (["plan", "train.py:build", "-o", "absent/plan.json"], "There is no folder"),
        (["doctor", "--", "x"], "takes nothing after `--`"),
    ],
)
def test_usage_errors_exit_with_2_and_no_traceback(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "train.py").write_text("number = 3\ndef build():\n    return 3\n")
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.modules.pop("train", None)
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_the_exceptions_of_a_build_function_are_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken.py").write_text("import absent_module_of_the_user\n")
    with pytest.raises(ModuleNotFoundError, match="absent_module_of_the_user"):
        main(["plan", "broken.py:build"])
    sys.modules.pop("broken", None)


def test_plan_prints_and_writes(shell):
    shell.write("train.py", SCRIPT)
    done = shell.memfit("plan", "train.py:build", "--budget", "min", "-o", "plan.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("peak ")
    assert "predicted" in done.stdout
    again = shell.memfit("plan", "train.py:build", "--policy", "full", "--json")
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("{")
    applied = shell.memfit("plan", "train.py:build", "--budget", "2 MiB")
    assert applied.returncode == 3
    assert "No plan fits 2.00 MiB" in applied.stderr
    assert "Traceback" not in applied.stderr
