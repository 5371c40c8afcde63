"""Python scripts as a user runs them, in a fresh interpreter or in this one."""

import contextlib
import io
import pathlib
import runpy
import subprocess
import sys

import jax
import jaxtyping
import pytest

ROOT = pathlib.Path(__file__).parent.parent


def run_python(*args, warnings="error"):
    """What a script does with the arguments after it; `-c` and a program work too."""
    return subprocess.run(
        [sys.executable, "-W", warnings, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
    )


def run_here(script, *args):
    """The same in this process, on its eight devices: quicker, an error is raised."""
    command, code = [str(script), *map(str, args)], 0
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        patch.syspath_prepend(pathlib.Path(script).parent)  # as Python does
        patch.setattr(jax.config, "update", lambda name, value: None)
        jaxtyping.config.update("jaxtyping_disable", True)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                runpy.run_path(str(script), run_name="__main__")
            except SystemExit as end:
                code = end.code
            finally:
                jaxtyping.config.update("jaxtyping_disable", False)
    if isinstance(code, str):  # Python prints it
        print(code, file=errors)
        code = 1
    return subprocess.CompletedProcess(
        command, code or 0, out.getvalue(), errors.getvalue()
    )
