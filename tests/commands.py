"""Python scripts in a fresh interpreter, as a user runs them, but compiled quickly."""

import os
import pathlib
import subprocess
import sys

from tests.models import QUICKLY

ROOT = pathlib.Path(__file__).parent.parent
XLA_FLAGS = " ".join(f"--{name}={value}".lower() for name, value in QUICKLY.items())


def run_python(*args, warnings="error"):
    """What a script does with the arguments after it; `-c` and a program work too."""
    return subprocess.run(
        [sys.executable, "-W", warnings, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"XLA_FLAGS": XLA_FLAGS},
    )
