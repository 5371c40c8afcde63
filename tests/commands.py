"""Python scripts in a fresh interpreter, as a user runs them."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def run_python(*args, warnings="error"):
    """What a script does with the arguments after it; `-c` and a program work too."""
    return subprocess.run(
        [sys.executable, "-W", warnings, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
    )
