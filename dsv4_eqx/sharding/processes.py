"""Several processes, on one host or many, that run one computation together.

`initialize` is `jax.distributed.initialize` with three additions. All processes compare
their settings and versions at the start. A process that raises an exception tells the
others why, and all end. In a region of `together` no process waits for ever: after a
timeout all end and print their stacks. JAX's heartbeats find a process that was killed
or stopped: JAX aborts the others, and `faulthandler`, which is enabled, prints their
stacks.
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
_MOST_SHOWN: Final = 6  # differences of one process in an error
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
    """This process as one of several; made by `initialize`."""

    def __init__(self, index: int, timeout: int):
        self.index, self.timeout = index, timeout
        self._name = f"process {index} ({socket.gethostname()}, pid {os.getpid()})"
        self._client: Any = distributed.global_state.client
        self._region: str | None = None
        self._region_error: BaseException | None = None
        self._raised = False

    @contextlib.contextmanager
    def together(self, name: str, *, timeout: int | None = None) -> Iterator[None]:
        """A region for code that waits for other processes, such as a training step.

        If this process has not left it after `timeout` seconds, all processes end, and
        each prints the stacks of all its threads. The region uses the timer of
        `faulthandler.dump_traceback_later`, of which a process has only one.

        **Arguments:**

        - `name`: name of the region, for messages.
        - `timeout`: seconds; by default the `timeout` of `initialize`. Give more where
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
        # This timer also works while C code holds Python's lock.
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
        """Ends all processes, if no other process has done so before."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(_FAILURE, why)

    def _watch(self) -> None:
        """Ends this process when any process has given a reason."""
        try:
            why = self._client.blocking_key_value_get(_FAILURE, _FOREVER)
        except jax.errors.JaxRuntimeError:  # shutdown, or a failure that JAX reports
            return
        if not self._raised:
            os.write(_STDERR, f"{self._name} ends: {why}\n".encode())
            faulthandler.dump_traceback(_STDERR)
        # Process 0 has the store and ends last: JAX would report its end as a failure.
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

    Enter it before anything that makes JAX look for devices. Leaving the context waits
    for the other processes. An exception that leaves it ends them: at once, or after
    `heartbeat_timeout` if the exception left a region, since another process that died
    may have caused it. The others do not wait for a process that is stopped (SIGSTOP),
    which ends when it is continued.

    **Arguments:**

    - `address`: host and port of process 0, open to the other hosts and to nobody else.
    - `num_processes`: how many processes there are.
    - `index`: number of this process, from 0.
    - `settings`: values that must be equal on all processes, by name: a configuration,
        a mesh's sizes, options. Data classes, mappings and sequences are compared entry
        by entry, anything else by its `repr`.
    - `timeout`: default timeout of a region, in seconds.
    - `heartbeat_timeout`: seconds after which JAX considers a silent process dead.
    - `initialization_timeout`: seconds within which all must have started; JAX aborts
        processes that wait longer, and does not report which ones are missing.
    - `options`: other arguments of `jax.distributed.initialize`.

    **Raises:** ValueError for an argument out of its range; and on all processes,
    naming the process, the item and both values, if settings or versions differ.
    """
    num_processes = validate_size("initialize", "num_processes", num_processes)
    index = validate_int("initialize", "index", index, least=0, most=num_processes - 1)
    timeout = validate_size("initialize", "timeout", timeout)
    heartbeat = validate_size("initialize", "heartbeat_timeout", heartbeat_timeout)
    wait = validate_size("initialize", "initialization_timeout", initialization_timeout)
    _validate(address, settings)
    entries = _settings(num_processes, settings or {})
    if not faulthandler.is_enabled():
        faulthandler.enable(_STDERR)
    jax.distributed.initialize(
        address,
        num_processes,
        index,
        initialization_timeout=wait,
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=timeout + heartbeat,
        **options,
    )
    processes = Processes(index, timeout)
    if differences := _differences(processes, entries, 1000 * wait):
        jax.distributed.shutdown()
        raise ValueError(f"initialize: {differences}: start all of them alike.")
    watch = threading.Thread(target=processes._watch, daemon=True)
    watch.start()
    try:
        yield processes
        with processes.together("the end"):
            jax.distributed.shutdown()
            # JAX's C++ code aborts a thread that comes back from it as Python ends.
            watch.join()
    except BaseException as error:
        processes._raised = True
        why = f"{processes._name} failed: {type(error).__name__}: {error}"
        # If another process that died caused it, JAX finds that one in the meantime.
        delay = heartbeat + 1 if error is processes._region_error else 0
        _start_timer(delay, lambda: processes._tell(why))
        raise


def _start_timer(seconds: int, call: Callable[[], None]) -> threading.Timer:
    """Calls after some seconds, unless cancelled or the process has ended."""
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    return timer


def _settings(num_processes: int, settings: Mapping[str, Any]) -> dict[str, str]:
    """All settings and versions to compare: the `repr` of every entry by its name."""
    values: dict[str, Any] = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            values[package] = importlib.metadata.version(package)
    values |= {option: getattr(jax.config, option) for option in _OPTIONS}
    values["num_processes"] = num_processes
    for name, value in settings.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        values[name] = value
    leaves = jax.tree.leaves_with_path(values, is_leaf=lambda x: x is None)
    keystr = jax.tree_util.keystr
    return {keystr(at, simple=True, separator="."): repr(x) for at, x in leaves}


def _differences(processes: Processes, entries: Mapping[str, str], wait: int) -> str:
    """How processes differ from process 0, the same text on all; empty if equal."""
    client = processes._client
    if processes.index == 0:
        client.key_value_set(_SETTINGS, json.dumps(entries))
    first = json.loads(client.blocking_key_value_get(_SETTINGS, wait))
    differ = []
    for item in sorted(first.keys() | entries.keys()):
        if entries.get(item) != first.get(item):
            here, there = (x.get(item, "nothing")[:_LONGEST] for x in (entries, first))
            differ.append(f"{item} {here}, process 0 has {there}")
    if len(differ) > _MOST_SHOWN:
        differ[_MOST_SHOWN:] = [f"{len(differ) - _MOST_SHOWN} more"]
    if differ:
        text = f"{processes._name} has {'; '.join(differ)}"
        client.key_value_set(f"{_DIFFERENCES}/{processes.index:09}", text)
    client.wait_at_barrier(_DIFFERENCES, wait)
    return "; ".join(text for _, text in sorted(client.key_value_dir_get(_DIFFERENCES)))


def _validate(address: Any, settings: Any) -> None:
    """Refuses an address or settings that `initialize` cannot use."""
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("",) * 3
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        allowed = "host:port, of process 0"
        raise invalid_argument("initialize", "address", address, allowed)
    if not isinstance(settings, Mapping | None):
        allowed = "a mapping of names to values"
        raise invalid_argument("initialize", "settings", settings, allowed)
