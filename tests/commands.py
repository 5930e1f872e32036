"""The command line in this process: its flags, and how it fails."""

from collections.abc import Mapping
from typing import Any

from typer.testing import CliRunner, Result

from texforce import cli


def invoke(*arguments: object, columns: int = 1000) -> Result:
    """Run a command on a terminal so wide that no message is wrapped."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options as flags, of a list one for each item."""
    pairs = [(name, value) for name, given in options.items() for value in (given if isinstance(given, list) else [given])]
    return [text for name, value in pairs for text in (f"--{name.replace('_', '-')}", str(value))]


def check_failure(result: Result, code: int, *words: str) -> None:
    """The exit code, and a message of one line without traceback, as the last one, that holds the words."""
    assert result.exit_code == code, (result.exit_code, repr(result.exception), result.output)
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    last = result.stderr.rstrip("\n").splitlines()[-1]
    assert last.startswith("error: ")
    assert result.stderr.count("error: ") == 1
    for word in words:
        assert word in last
