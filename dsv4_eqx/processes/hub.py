"""The hub: in the monitor of process 0, it hears all monitors and judges.

Monitors send one JSON object a line. The first of a monitor says who its process is and
what its settings are; then come its beats, the regions that it enters, and its end. The
hub sends signs of life, that all are alike, and at last, if there is one, the verdict.
"""

import json
import os
import selectors
import socket
import threading
import time
from typing import Final

from dsv4_eqx.processes.verdict import Message, Peer, Verdict, differences, judge

TICK: Final = 0.25  # seconds between looks
GRACE: Final = 5.0  # seconds in which a process that failed may end by itself
_MOST_BYTES: Final = 1 << 20  # of a line


class Clock:
    """Seconds in which this process ran: those in which it was stopped do not count."""

    def __init__(self):
        self.now = 0.0
        self._last = time.monotonic()

    def advance(self) -> float:
        """The time now; to be called at every look."""
        now = time.monotonic()
        self.now += min(now - self._last, 8 * TICK)
        self._last = now
        return self.now


class Line:
    """A connection that carries one JSON object a line."""

    def __init__(self, file: int, connection: socket.socket | None = None):
        """**Arguments:**

        - `file`: to read from.
        - `connection`: to send to.
        """
        self.file, self.connection = file, connection
        self.peer: Peer | None = None
        self._rest = b""

    def read(self) -> list[Message] | None:
        """What has come, or None at the end."""
        try:
            data = os.read(self.file, 1 << 16)
        except OSError:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > _MOST_BYTES:
            return None
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            return None  # whoever that is

    def close(self) -> None:
        """Ends the connection."""
        assert self.connection is not None
        self.connection.close()

    def send(self, message: Message) -> None:
        """Sends, if the other side is there.

        **Arguments:**

        - `message`: what to send.
        """
        assert self.connection is not None
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # reading finds the end


class Hub(threading.Thread):
    """Hears all monitors and judges; in the monitor of process 0."""

    def __init__(self, options: Message):
        """**Arguments:**

        - `options`: of the monitor.
        """
        super().__init__(daemon=True)
        self.num_processes: int = options["num_processes"]
        self.timeout: float = options["timeout"]
        self.start_timeout: float = options["initialization_timeout"]
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self.listener = socket.create_server(
            ("", options["port"]), family=family, dualstack_ipv6=both
        )
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.peers: dict[int, Peer] = {}
        self.lines: list[Line] = []
        self.clock, self.told, self.agreed = Clock(), 0.0, False

    def run(self) -> None:
        """Until all are done, or one has to be told of."""
        verdict = None
        while verdict is None:
            events = self.selector.select(TICK)
            now = self.clock.advance()
            for key, _ in events:
                if key.data is None:
                    self._accept()
                else:
                    verdict = verdict or self._hear(key.data, now)
            verdict = verdict or self._judge(now)
            if self.agreed and all(peer.is_done for peer in self.peers.values()):
                return
            if now - self.told >= TICK:
                self.told = now
                for line in self.lines:
                    line.send({"kind": "alive"})
        for line in self.lines:
            line.send({"kind": "verdict", **verdict._asdict()})
        # Closing a connection on which something arrives would take the verdict back.
        give_up = self.clock.advance() + GRACE
        while self.lines and self.clock.advance() < give_up:
            for key, _ in self.selector.select(TICK):
                if key.data is not None:
                    self._hear(key.data, 0.0)

    def _accept(self) -> None:
        connection, _ = self.listener.accept()
        connection.settimeout(2)  # nobody holds up the others
        line = Line(connection.fileno(), connection)
        self.selector.register(connection, selectors.EVENT_READ, line)

    def _hear(self, line: Line, now: float) -> Verdict | None:
        messages = line.read()
        if messages is None:
            self.selector.unregister(line.file)
            if line.peer is not None:
                self.lines.remove(line)
                lost = {"kind": "ended", "why": "is lost: its connection closed"}
                line.peer.update(lost, now)
            return None
        for message in messages:
            if line.peer is None:
                try:
                    peer = Peer(message, now)
                except (KeyError, TypeError):
                    continue  # whoever that is
                if peer.index in self.peers:
                    text = f"{peer.name} and {self.peers[peer.index].name} have one id"
                    self.lines.append(line)
                    return Verdict("ValueError", text)
                line.peer = self.peers[peer.index] = peer
                self.lines.append(line)
            else:
                line.peer.update(message, now)
        return None

    def _judge(self, now: float) -> Verdict | None:
        peers = [self.peers[index] for index in sorted(self.peers)]
        if self.agreed:
            return judge(peers, self.timeout, now)
        for peer in peers:
            if peer.ended:
                return Verdict("RuntimeError", f"{peer.name} {peer.ended}")
        if len(peers) < self.num_processes:
            if now <= self.start_timeout:
                return None
            absent = sorted(set(range(self.num_processes)) - self.peers.keys())
            names = ", ".join(map(str, absent))
            text = f"process {names} has not started within {self.start_timeout:g} s"
            return Verdict("TimeoutError", text)
        if text := differences(peers):
            return Verdict("ValueError", f"not alike: {text}")
        self.agreed = True
        for peer in peers:
            peer.beat = now  # those that were early have waited
        for line in self.lines:
            line.send({"kind": "agreed"})
        return None
