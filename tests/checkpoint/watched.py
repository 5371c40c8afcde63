"""What loading a checkpoint does beside giving a model or an error, and its limits."""

import contextlib
import functools
import os
import pathlib
import re
import signal
import sys
import tracemalloc

_HANGS = 30  # seconds; loading takes about one
_FORBIDDEN = (
    "exec os.system os.exec os.fork os.forkpty os.posix_spawn os.spawn subprocess.Popen"
    " pickle.find_class ctypes.dlopen socket.connect socket.getaddrinfo os.remove"
    " os.rename os.mkdir os.rmdir os.link os.symlink os.truncate shutil.rmtree"
).split()
_CHECKERS = re.compile(r"site-packages.(jaxtyping|beartype).")
_watching: list[list] = []  # the list that events go to, while there is one


def _record(event, arguments):
    if not _watching or (event != "open" and event not in _FORBIDDEN):
        return
    # The type checker of the tests, which users run without, makes its checks by exec.
    caller = sys._getframe(1).f_code.co_filename
    if event != "exec" or not _CHECKERS.search(caller):
        _watching[0].append((event, arguments))


@functools.cache
def _install_hook():
    sys.addaudithook(_record)  # it cannot be taken away again


@contextlib.contextmanager
def nothing_outside(*directories):
    """Fails if a file elsewhere is opened, links followed, or anything is executed."""
    _install_hook()
    events = []
    _watching.append(events)
    try:
        yield
    finally:
        _watching.clear()
    allowed = [os.path.realpath(directory) for directory in directories]
    for event, arguments in events:
        assert event == "open", (event, arguments)
        path = arguments[0]
        if isinstance(path, int):  # a file that is open already
            continue
        real = pathlib.Path(os.path.realpath(os.fsdecode(path)))
        assert any(real.is_relative_to(parent) for parent in allowed), path
        assert not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR), path


class Hangs(BaseException):
    """Loading did not return; nothing catches it by accident."""


def _stop(*_):
    raise Hangs


@contextlib.contextmanager
def without_hanging():
    """Fails what does not return: it is ended after half a minute."""
    before = signal.signal(signal.SIGALRM, _stop)
    signal.alarm(_HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def in_little_memory(directory, *, traced):
    """Fails above 200 MB and twice the files' size.

    Traced is what Python and numpy ask for: exact, whatever earlier cases have left in
    the heap, but slow and blind to what JAX takes. Otherwise it is how far
    resident memory rises, in which JAX's counts and memory that was free before does
    not.
    """
    paths = directory.iterdir() if directory.is_dir() else ()
    sizes = [p.stat().st_size for p in paths if p.is_file() and not p.is_symlink()]
    most = 200e6 + 2 * sum(sizes)
    start = _start_peak(traced)
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] if traced else _status("VmHWM")
        assert peak - start <= most, f"{(peak - start) / 1e6:.0f} MB"
    finally:
        tracemalloc.stop()


def _start_peak(traced):
    if traced:
        tracemalloc.start()
        return 0
    with contextlib.suppress(OSError):  # where the kernel has no such file
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return _status("VmHWM")


def _status(field):
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])
