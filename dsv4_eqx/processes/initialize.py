"""Several processes, on one host or on many, that compute one thing together.

`initialize` is `jax.distributed.initialize`, and two things more. Before JAX connects,
all processes compare their settings and versions, and each says who differs. From then
on they watch each other: where one is killed, is stopped or hangs, all end, and say
which it was. JAX alone names no process when its coordinator dies, waits 100 s for one
that is stopped, and for ever for one that hangs.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Final

import jax

from dsv4_eqx.numerics.validation import invalid_argument
from dsv4_eqx.processes.verdict import RAISED

_CALL: Final = "initialize"
_PACKAGE: Final = pathlib.Path(__file__).parent.parent
# An empty package stands in for ours: a monitor needs neither it nor JAX.
_MONITOR: Final = (
    "import sys, types; package = types.ModuleType('dsv4_eqx'); "
    "package.__path__ = [sys.argv[1]]; sys.modules['dsv4_eqx'] = package; "
    "from dsv4_eqx.processes.monitor import main; main()"
)
_ERRORS: Final = {
    error.__name__: error for error in (ValueError, TimeoutError, OSError, RuntimeError)
}
# Of JAX's options, those that change numbers or programs.
_OPTIONS: Final = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)
_LONGEST: Final = 80  # characters of a setting that is shown as it is
_LONGEST_ERROR: Final = 300  # characters, of 12 bytes each at most in a message


class Processes:
    """This process among the others; made by `initialize`."""

    def __init__(self, monitor: subprocess.Popen, index: int, timeout: float):
        """**Arguments:**

        - `monitor`: that watches this process.
        - `index`: of this process.
        - `timeout`: seconds.
        """
        self.index, self.timeout = index, timeout
        self._monitor = monitor
        self._thread = threading.get_ident()
        self._is_together = False
        self._ended = threading.Event()

    @contextlib.contextmanager
    def together(self, name: str, *, timeout: float | None = None) -> Iterator[None]:
        """A region that all processes enter, in the same order.

        Put into it whatever waits for the others: a training step, and reading its
        loss. Where one has waited in it for `timeout` seconds, all processes end, and
        those that have not come are named; if all have, so is where each one is.

        **Arguments:**

        - `name`: for messages, and the same on all.
        - `timeout`: seconds, as `initialize` was told by default. Give more where
            something is compiled: nobody knows how long that takes.

        **Raises:** ValueError inside another such region, and if an argument is
        something else.
        """
        if not isinstance(name, str):
            raise invalid_argument("together", "name", name, "a text")
        if self._is_together:
            raise ValueError(f"together({name!r}): this is inside another region.")
        seconds = self.timeout
        if timeout is not None:
            seconds = _seconds("together", "timeout", timeout)
        self._is_together, failure = True, ""
        self._tell({"kind": "enter", "name": name, "timeout": seconds})
        try:
            yield
        except BaseException as error:
            failure = _described(error)
            raise
        finally:
            self._is_together = False
            self._tell({"kind": "leave", "failure": failure})

    def _tell(self, message: dict[str, Any]) -> None:
        """Writes a line to the monitor; short enough to be written in one piece."""
        assert self._monitor.stdin is not None
        try:
            os.write(self._monitor.stdin.fileno(), json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            if self._ended.is_set():
                return
            text = f"process {self.index} ends: its monitor died\n"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
            os._exit(1)

    def _beat(self) -> None:
        """Tells again and again that Python runs, and where the caller's thread is."""
        while not self._ended.wait(min(1.0, self.timeout / 8)):
            self._tell({"kind": "beat", "where": _where(self._thread)})


@contextlib.contextmanager
def initialize(
    coordinator_address: str,
    num_processes: int,
    process_id: int,
    *,
    settings: Mapping[str, Any] | None = None,
    timeout: float = 40.0,
    initialization_timeout: float = 50.0,
    monitor_port: int | None = None,
    **options: Any,
) -> Iterator[Processes]:
    """A context in which this process computes with the others.

    Call it before anything that makes JAX look for devices. Leaving it waits for the
    others; leaving it by an exception ends them.

    **Arguments:**

    - `coordinator_address`: host and port of process 0, as for JAX.
    - `num_processes`: how many there are.
    - `process_id`: which of them this is, from 0.
    - `settings`: what must be the same on all, by name: a configuration, a mesh's
        sizes, options. Data classes and mappings are compared entry by entry, all else
        by its `repr`.
    - `timeout`: seconds that a process may be silent, or may let the others wait in a
        region.
    - `initialization_timeout`: seconds within which all must have started.
    - `monitor_port`: of process 0; the coordinator's and one by default. Like the
        coordinator's, it must be open to the other hosts and to nobody else.
    - `options`: more of `jax.distributed.initialize`'s.

    **Raises:** ValueError naming the process, the item and both values if settings or
    versions differ, and for an argument out of its range; TimeoutError naming those
    that did not start in time; OSError if the port is in use. After that, nothing can
    be raised in a process that waits inside a collective: all are killed, and what
    their monitors print names the process.
    """
    host, port = _checked_address(coordinator_address)
    _validate_counts(num_processes, process_id)
    if not isinstance(settings, Mapping | None):
        raise invalid_argument(
            _CALL, "settings", settings, "a mapping of names to values"
        )
    hello = dict(
        index=process_id,
        host=socket.gethostname(),
        pid=os.getpid(),
        settings=_settings(num_processes, settings or {}),
    )
    start = _seconds(_CALL, "initialization_timeout", initialization_timeout)
    timeout = _seconds(_CALL, "timeout", timeout)
    asked = dict(
        hello=hello,
        host=host,
        port=_checked_port(port + 1 if monitor_port is None else monitor_port),
        num_processes=num_processes,
        timeout=timeout,
        initialization_timeout=start,
    )
    processes = Processes(_started_monitor(asked), process_id, timeout)
    threading.Thread(target=processes._beat, daemon=True).start()
    try:
        with processes.together("jax.distributed.initialize", timeout=start):
            jax.distributed.initialize(
                coordinator_address, num_processes, process_id, **options
            )
        yield processes
        with processes.together("the end"):
            jax.distributed.shutdown()
    except BaseException as error:
        why = RAISED + _described(error)
        processes._ended.set()
        processes._tell({"kind": "ended", "why": why})
        raise
    processes._ended.set()
    processes._tell({"kind": "done"})


def _started_monitor(asked: Mapping[str, Any]) -> subprocess.Popen:
    """A monitor that has met the others and found that all are alike."""
    command = [sys.executable, "-I", "-S", "-c", _MONITOR]
    monitor = subprocess.Popen(
        [*command, str(_PACKAGE), json.dumps(asked)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    stdin, stdout = monitor.stdin, monitor.stdout
    assert stdin is not None and stdout is not None
    with stdout:
        answer = json.loads(stdout.readline() or b"{}")
    if answer.get("kind") == "agreed":
        return monitor
    stdin.close()
    monitor.wait()
    error = _ERRORS[answer.get("error", "RuntimeError")]
    raise error(f"{_CALL}: {answer.get('text', 'the monitor died')}")


def _settings(num_processes: int, given: Mapping[str, Any]) -> dict[str, str]:
    """What is compared, by name."""
    found: dict[str, str] = {"num_processes": str(num_processes)}
    found["python"] = platform.python_version()
    for package in ("jax", "jaxlib", "equinox", "dsv4-eqx"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    for option in _OPTIONS:
        found[option] = str(getattr(jax.config, option))

    def add(name: str, value: Any) -> None:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name}.{key}", inner)
            return
        text = repr(value)
        if len(text) > _LONGEST:
            digest = hashlib.sha256(text.encode()).hexdigest()[:12]
            text = f"{text[:_LONGEST]}... (sha256 {digest})"
        found[name] = text

    for name, value in given.items():
        add(name, value)
    return found


def _where(thread: int) -> str:
    """File, line and function where a thread is, outside of JAX."""
    frame = sys._current_frames().get(thread)
    ours = frame
    jax_itself = str(pathlib.Path(jax.__file__).parent)
    while ours is not None and ours.f_code.co_filename.startswith(jax_itself):
        ours = ours.f_back
    frame = ours or frame
    if frame is None:
        return ""
    code = frame.f_code
    name = pathlib.Path(code.co_filename).name
    return f"{name}:{frame.f_lineno} in {code.co_name}"


def _checked_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("",) * 3
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise invalid_argument(
            _CALL, "coordinator_address", address, "host:port, of process 0"
        )
    return host.strip("[]"), int(port)


def _checked_port(port: int) -> int:
    if type(port) is not int or not 0 < port < 65536:
        raise invalid_argument(_CALL, "monitor_port", port, "an integer in [1, 65,535]")
    return port


def _validate_counts(num_processes: int, process_id: int) -> None:
    if type(num_processes) is not int or num_processes < 1:
        raise invalid_argument(
            _CALL, "num_processes", num_processes, "a positive integer"
        )
    if type(process_id) is not int or not 0 <= process_id < num_processes:
        wanted = f"an integer from 0 to {num_processes - 1}"
        raise invalid_argument(_CALL, "process_id", process_id, wanted)


def _described(error: BaseException) -> str:
    """What it is, so short that a message with it is written in one piece."""
    return f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]


def _seconds(call: str, name: str, value: float) -> float:
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise invalid_argument(call, name, value, "a positive number of seconds")
    return float(value)
