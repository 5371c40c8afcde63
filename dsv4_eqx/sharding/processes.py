"""Several processes, on one host or many, that compute one thing together.

`initialize` is `jax.distributed.initialize` and three things more. All processes
compare their settings and versions at the start. One that raises tells the others why.
And in a region of `together` none waits for ever: after a timeout all end, with every
stack. A process that is killed or stopped is found by JAX's heartbeats: JAX aborts all
others, and `faulthandler`, which is turned on, prints their stacks.
"""

import contextlib
import dataclasses
import faulthandler
import importlib.metadata
import json
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import jax
from jax._src import distributed  # the key-value store, which is nowhere public

from dsv4_eqx.numerics.validation import invalid_argument, validate_int, validate_size

_FAILURE: Final = "dsv4_eqx/failure"  # keys of the store
_SETTINGS: Final = "dsv4_eqx/settings"
_DIFFERENCES: Final = "dsv4_eqx/differences"
_STDERR: Final = 2
_GRACE: Final = 3  # seconds in which Python may end by itself
_FOREVER: Final = 10**12  # milliseconds
_MOST_SHOWN: Final = 6  # differences of a process
_LONGEST: Final = 80  # characters of a setting in an error
_PACKAGES: Final = ("jax", "jaxlib", "equinox", "dsv4-eqx")
# Of JAX's options, those that change numbers or programs.
_OPTIONS: Final = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)


class Processes:
    """This process among the others; made by `initialize`."""

    def __init__(self, index: int, timeout: int):
        """**Arguments:**

        - `index`: of this process.
        - `timeout`: seconds, of a region by default.
        """
        self.index, self.timeout = index, timeout
        self._name = f"process {index} ({socket.gethostname()}, pid {os.getpid()})"
        self._client: Any = distributed.global_state.client
        self._region: str | None = None
        self._region_error: BaseException | None = None
        self._raised = False

    @contextlib.contextmanager
    def together(self, name: str, *, timeout: int | None = None) -> Iterator[None]:
        """A region for whatever waits for the others, such as a step and its loss.

        If this process has not left it after `timeout` seconds, all processes end, and
        each prints the stacks of all its threads. The timer is the one timer of
        `faulthandler.dump_traceback_later`.

        **Arguments:**

        - `name`: for messages.
        - `timeout`: seconds, by default as `initialize` was told. Give more where
            something is compiled or loaded.

        **Raises:** ValueError inside another such region, and if `timeout` is not a
        positive integer.
        """
        if self._region is not None:
            raise ValueError(
                f"together({name!r}) inside together({self._region!r}): leave that one "
                "first, there is one timer."
            )
        timeout = self.timeout if timeout is None else timeout
        seconds = validate_size("together", "timeout", timeout)
        why = f"{self._name} did not get out of {name!r} for {seconds} s"
        timer = _start_timer(seconds, lambda: self._tell(why))
        # Where C code keeps Python's lock, no thread of Python runs; this one does.
        faulthandler.dump_traceback_later(seconds + 2 * _GRACE, exit=True, file=_STDERR)
        self._region = name
        try:
            yield
        except BaseException as error:
            self._region_error = error
            raise
        finally:
            self._region = None
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()

    def _tell(self, why: str) -> None:
        """Ends all processes, if this is the first to say why."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(_FAILURE, why)

    def _watch(self) -> None:
        """Ends this process when any of them says why."""
        try:
            why = self._client.blocking_key_value_get(_FAILURE, _FOREVER)
        except jax.errors.JaxRuntimeError:  # the end, or what JAX itself tells of
            return
        if not self._raised:
            os.write(_STDERR, f"{self._name} ends: {why}\n".encode())
            faulthandler.dump_traceback(_STDERR)
        # JAX would take the end of process 0, which has the store, for another failure.
        time.sleep(_GRACE + (self.index == 0))
        os._exit(1)


@contextlib.contextmanager
def initialize(
    address: str,
    num_processes: int,
    index: int,
    *,
    settings: Mapping[str, Any] | None = None,
    timeout: int = 30,
    heartbeat_timeout: int = 20,
    initialization_timeout: int = 50,
    **options: Any,
) -> Iterator[Processes]:
    """A context in which this process computes with the others.

    Call it before anything that makes JAX look for devices. Leaving it waits for the
    others; leaving it by an exception ends them, after `heartbeat_timeout` if it comes
    out of a region, where it may be the work of another that died. The others do not
    wait for a process that is stopped (SIGSTOP); it ends when it is continued.

    **Arguments:**

    - `address`: host and port of process 0, open to the other hosts and to nobody else.
    - `num_processes`: how many there are.
    - `index`: which of them this is, from 0.
    - `settings`: what must be the same on all, by name: a configuration, a mesh's
        sizes, options. Data classes, mappings and sequences are compared entry by
        entry, all else by its `repr`.
    - `timeout`: seconds that a process may stay in a region, by default.
    - `heartbeat_timeout`: seconds after which JAX takes a silent process for dead.
    - `initialization_timeout`: seconds within which all must have started; JAX aborts
        those that wait longer, and does not say who is missing.
    - `options`: more of `jax.distributed.initialize`'s.

    **Raises:** ValueError for an argument out of its range; on all processes, naming
    the process, the item and both values, if settings or versions differ.
    """
    num_processes = validate_size("initialize", "num_processes", num_processes)
    most = num_processes - 1
    index = validate_int("initialize", "index", index, least=0, most=most)
    _validate(address, settings)
    timeout = validate_size("initialize", "timeout", timeout)
    heartbeat = validate_size("initialize", "heartbeat_timeout", heartbeat_timeout)
    start = initialization_timeout
    start = validate_size("initialize", "initialization_timeout", start)
    own = _settings(num_processes, settings or {})
    if not faulthandler.is_enabled():
        faulthandler.enable(_STDERR)
    jax.distributed.initialize(
        address,
        num_processes,
        index,
        initialization_timeout=start,
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=timeout + heartbeat,
        **options,
    )
    processes = Processes(index, timeout)
    if differences := _differences(processes, own, 1000 * start):
        jax.distributed.shutdown()
        raise ValueError(f"initialize: {differences}: start all of them alike.")
    threading.Thread(target=processes._watch, daemon=True).start()
    try:
        yield processes
        with processes.together("the end"):
            jax.distributed.shutdown()
    except BaseException as error:
        processes._raised = True
        why = f"{processes._name} failed: {type(error).__name__}: {error}"
        # If it is the work of another that died, JAX finds that one in the meantime.
        wait = heartbeat + 1 if error is processes._region_error else 0
        _start_timer(wait, lambda: processes._tell(why))
        raise


def _start_timer(seconds: int, call: Callable[[], None]) -> threading.Timer:
    """Calls later, unless it is cancelled or the process has ended."""
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    return timer


def _settings(num_processes: int, given: Mapping[str, Any]) -> dict[str, str]:
    """What is compared: the `repr` of every entry, by its name."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    found |= {option: getattr(jax.config, option) for option in _OPTIONS}
    found["num_processes"] = num_processes
    for name, value in given.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        found[name] = value
    leaves = jax.tree.leaves_with_path(found, is_leaf=lambda x: x is None)
    keystr = jax.tree_util.keystr
    return {keystr(at, simple=True, separator="."): repr(x) for at, x in leaves}


def _differences(processes: Processes, own: Mapping[str, str], wait: int) -> str:
    """What processes have that process 0 has not, the same text on all; or nothing."""
    client, index = processes._client, processes.index
    if index == 0:
        client.key_value_set(_SETTINGS, json.dumps(own))
    first = json.loads(client.blocking_key_value_get(_SETTINGS, wait))
    differ = []
    for item in sorted(first.keys() | own.keys()):
        this, that = (x.get(item, "nothing")[:_LONGEST] for x in (own, first))
        if own.get(item) != first.get(item):
            differ.append(f"{item} {this}, process 0 has {that}")
    if len(differ) > _MOST_SHOWN:
        differ[_MOST_SHOWN:] = [f"{len(differ) - _MOST_SHOWN} more"]
    if differ:
        text = f"{processes._name} has {'; '.join(differ)}"
        client.key_value_set(f"{_DIFFERENCES}/{index:09}", text)
    client.wait_at_barrier(_DIFFERENCES, wait)
    return "; ".join(text for _, text in sorted(client.key_value_dir_get(_DIFFERENCES)))


def _validate(address: Any, settings: Any) -> None:
    """Refuses what `initialize` cannot start from."""
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("",) * 3
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        allowed = "host:port, of process 0"
        raise invalid_argument("initialize", "address", address, allowed)
    if not isinstance(settings, Mapping | None):
        allowed = "a mapping of names to values"
        raise invalid_argument("initialize", "settings", settings, allowed)
