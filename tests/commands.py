"""``python -m zokern`` with many lists of arguments, in one process that imports torch once."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

LOOP = """
import contextlib, io, json, sys
from zokern import __main__

def answer(arguments):
    sys.argv = ["zokern", *arguments]
    said = io.StringIO()
    code = None
    with contextlib.redirect_stderr(said):
        try:
            __main__.main()
        except SystemExit as end:
            code = end.code
    # As Python does: a message is an error.
    message = code if isinstance(code, str) else ""
    return 1 if message else code or 0, said.getvalue() + message

print(json.dumps([answer(arguments) for arguments in json.load(sys.stdin)]))
"""


def answers_to(commands: Iterable[Iterable[object]]) -> list[tuple[int, str]]:
    """The exit status of each command, and what it wrote to its standard error."""
    run = subprocess.run(
        [sys.executable, "-c", LOOP],
        input=json.dumps([[str(part) for part in command] for command in commands]),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)
