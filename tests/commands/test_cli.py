"""Exit status and messages that all commands share, and the table of subcommands."""

import errno
import subprocess
import sys

import pytest

from hf_vit import cli
from hf_vit.cli import COMMANDS, UsageError, find_script, main, run


def failing(error):
    def command(_):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("--a needs --b"), 2, "error: --a needs --b"),
        (ValueError("found x:\n   expected y"), 1, "error: found x: expected y"),
        (RuntimeError("in use"), 1, "error: in use"),
        (OSError(errno.EISDIR, "expected a file, got a folder", "d"), 1, "error: d: expected a file, got a folder"),
        (KeyError("k"), 1, "error: KeyError: 'k' (--debug shows the traceback)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_each_failure_is_one_line_and_its_exit_status(capsys, error, status, line):
    assert run(failing(error), []) == status
    assert capsys.readouterr().err == line + "\n"
    with pytest.raises(type(error)):
        run(failing(error), ["--debug"])


def test_the_command_does_not_see_debug_and_its_status_is_passed_on():
    seen = []
    assert run(lambda arguments: seen.extend(arguments) or 3, ["a", "--debug", "b"]) == 3
    assert run(lambda arguments: None, []) == 0
    assert seen == ["a", "b"]


def test_a_reader_that_stops_early_is_not_an_error():
    code = "import sys; from hf_vit.cli import run; sys.exit(run(lambda _: print(*['x' * 99] * 9999, sep=chr(10))))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_help_lists_every_command_and_every_command_has_a_script(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, (script, text) in COMMANDS.items():
        assert f"  {name}" in shown
        assert text in shown
        assert "def main(" in find_script(script).read_text(encoding="utf-8")


def test_a_mistyped_command_is_answered_with_the_nearest_one(capsys):
    assert main(["convret"]) == 2
    assert capsys.readouterr().err == "error: unknown command convret, did you mean convert?\n"


def test_a_command_is_the_main_of_its_script(monkeypatch, tmp_path, capsys):
    (tmp_path / "scripted.py").write_text("import helper_of_script\n\ndef main(arguments):\n    print(arguments)\n")
    (tmp_path / "helper_of_script.py").write_text("")
    monkeypatch.setitem(COMMANDS, "convert", ("scripted.py", ""))
    monkeypatch.setattr(cli, "find_script", lambda name: tmp_path / name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["hf-vit"])
    assert main(["convert", "a", "--b"]) == 0
    assert capsys.readouterr().out == "['a', '--b']\n"
    assert sys.argv[0] == "hf-vit convert"
