"""Watches one process of several from outside it; started by `processes.initialize`.

A thread of the watched process would not do: JAX aborts a process whose coordinator
dies before a thread can say who died, and C code that keeps Python's lock stops every
thread. So each process has a monitor for a child. Monitors tell what they see to a hub
in the monitor of process 0, which compares settings and judges; they print its verdict
and kill their process. A monitor runs as a script, with the standard library alone, so
that it starts at once.
"""

import json
import os
import selectors
import signal
import socket
import sys
import time

from dsv4_eqx.processes.hub import GRACE, TICK, Clock, Hub, Line
from dsv4_eqx.processes.verdict import Message, Verdict


class Watcher:
    """Tells the hub of its process, and ends that when the hub says so."""

    def __init__(self, options: Message, connection: socket.socket):
        """**Arguments:**

        - `options`: of the monitor.
        - `connection`: to the hub.
        """
        self.options = options
        self.timeout: float = options["timeout"]
        self.hub = Line(connection.fileno(), connection)
        self.process = Line(0)
        self.selector = selectors.DefaultSelector()
        self.selector.register(0, selectors.EVENT_READ, self.process)
        self.selector.register(connection, selectors.EVENT_READ, self.hub)
        self.clock, self.heard, self.told = Clock(), 0.0, 0.0
        self.agreed = self.failed = self.gone = self.done = False

    def run(self) -> None:
        """Until the process is done, or all have to end."""
        self.hub.send(self.options["hello"])
        verdict = None
        while verdict is None and not (self.gone and self.done):
            events = self.selector.select(TICK)
            now = self.clock.advance()
            if not self.gone and os.getppid() != self.options["hello"]["pid"]:
                self._process_ended()
            for key, _ in events:
                if key.data is self.process:
                    self._hear_process()
                else:
                    verdict = verdict or self._hear_hub(now)
            if now - self.heard > self.timeout:
                verdict = verdict or self._hub_lost(f"silent for {self.timeout:g} s")
            if now - self.told >= TICK:  # not at once: an answer would be answered
                self.told = now
                self.hub.send({"kind": "alive", "state": state_of(os.getppid())})
        if verdict is not None:
            self._end(verdict)

    def _hear_process(self) -> None:
        messages = self.process.read()
        if messages is None:
            self.selector.unregister(0)
            self._process_ended()
            return
        for message in messages:
            self.done |= message["kind"] == "done"
            self.failed |= message["kind"] == "ended"
            self.hub.send(message)

    def _process_ended(self) -> None:
        if not (self.gone or self.done or self.failed):
            self.hub.send({"kind": "ended", "why": "died: killed, or crashed"})
        self.gone = True

    def _hear_hub(self, now: float) -> Verdict | None:
        messages = self.hub.read()
        if messages is None:
            return self._hub_lost("its connection closed")
        self.heard = now
        for message in messages:
            if message["kind"] == "verdict":
                return Verdict(message["error"], message["text"])
            if message["kind"] == "agreed":
                self.agreed = True
                tell_process(message)
        return None

    def _hub_lost(self, why: str) -> Verdict | None:
        if self.done:
            self.gone = True
            return None
        host = self.options["host"]
        return Verdict("RuntimeError", f"process 0 ({host}) or its host is lost: {why}")

    def _end(self, verdict: Verdict) -> None:
        """Raises the verdict in the process, or prints it and ends the process."""
        self.hub.close()
        if not self.agreed:
            tell_process({"kind": "verdict", **verdict._asdict()})
            return
        hello = self.options["hello"]
        start = f"process {hello['index']} ({hello['host']}, pid {hello['pid']}) ends: "
        print(start + verdict.text, file=sys.stderr, flush=True)
        wait_until = time.monotonic() + (GRACE if self.failed else 0)
        while os.getppid() == hello["pid"] and time.monotonic() < wait_until:
            time.sleep(TICK)
        if os.getppid() == hello["pid"]:
            os.kill(hello["pid"], signal.SIGKILL)


def state_of(pid: int) -> str:
    """The letter of a process's state, where the system has /proc; `T` if stopped.

    **Arguments:**

    - `pid`: of the process.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def tell_process(message: Message) -> None:
    """Answers the process that waits for the others.

    **Arguments:**

    - `message`: the answer.
    """
    try:
        print(json.dumps(message), flush=True)
    except OSError:
        pass  # it is gone


def connected(options: Message) -> socket.socket | None:
    """A connection to the hub, or None if there is none for long.

    **Arguments:**

    - `options`: of the monitor.
    """
    give_up = time.monotonic() + options["initialization_timeout"]
    while time.monotonic() < give_up and os.getppid() == options["hello"]["pid"]:
        try:
            address = options["host"], options["port"]
            connection = socket.create_connection(address, timeout=2)
        except OSError:
            time.sleep(TICK)
        else:
            connection.settimeout(2)
            return connection
    return None


def main() -> None:
    """Runs a monitor; its options are the only argument."""
    for interruption in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(interruption, signal.SIG_IGN)  # the process decides
    options: Message = json.loads(sys.argv[-1])
    host, port = options["host"], options["port"]
    hub = None
    if options["hello"]["index"] == 0:
        try:
            hub = Hub(options)
        except OSError as error:
            text = f"process 0 cannot listen on port {port}: {error}"
            tell_process({"kind": "verdict", "error": "OSError", "text": text})
            return
        hub.start()
    connection = connected(options)
    if connection is None:
        seconds = options["initialization_timeout"]
        text = f"process 0 cannot be reached at {host}:{port} for {seconds:g} s"
        tell_process({"kind": "verdict", "error": "TimeoutError", "text": text})
        return
    Watcher(options, connection).run()
    if hub is not None:
        hub.join(GRACE + 2 * TICK)
