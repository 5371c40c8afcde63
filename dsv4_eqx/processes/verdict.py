"""What is known of several processes, and when all of them have to end.

Only the standard library is used: monitors run this, and start at once. Seconds are
those of the hub that judges, in the monitor of process 0.
"""

from typing import Any, Final, NamedTuple

_MOST_NAMED: Final = 8
_SETTLED: Final = 1.0  # seconds after the first end in which others may tell of theirs
RAISED: Final = "failed: "  # what the end of a process by an exception starts with
Message = dict[str, Any]


class Verdict(NamedTuple):
    """Why all processes end, and the exception where one can still be raised."""

    error: str
    text: str


class Peer:
    """What the hub knows of a process."""

    def __init__(self, hello: Message, now: float):
        """**Arguments:**

        - `hello`: the first message of its monitor.
        - `now`: seconds.
        """
        self.index: int = hello["index"]
        self._who = f"{hello['host']}, pid {hello['pid']}"
        self.settings: dict[str, str] = hello["settings"]
        self.heard = self.beat = self.since = now
        self.where, self.state = "", ""
        self.num_entered, self.inside, self.limit = 0, "", 0.0
        self.failed_in, self.failure = 0, ""  # the last region left by an exception
        self.ended, self.is_done = "", False
        self.ended_order = False, False, now

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"process {self.index} ({self._who})"

    @property
    def name_and_place(self) -> str:
        """As messages call it, with where its Python code is."""
        at = f"; at {self.where}" if self.where else ""
        return f"process {self.index} ({self._who}{at})"

    def fault(self, now: float, timeout: float) -> str:
        """What is wrong with it if others wait for it, with its name.

        **Arguments:**

        - `now`: seconds.
        - `timeout`: seconds that they waited.
        """
        if self.state in ("T", "t"):
            return f"{self.name_and_place} is stopped (SIGSTOP or ^Z)"
        in_c = " in C code" if now - self.beat > timeout / 2 else ""
        return f"{self.name_and_place} hangs{in_c}"

    def update(self, message: Message, now: float) -> None:
        """Takes note of a message.

        **Arguments:**

        - `message`: from its monitor.
        - `now`: seconds.
        """
        self.heard = now
        kind = message["kind"]
        if kind == "alive":
            self.state = message["state"]
        elif kind == "beat":
            self.beat, self.where = now, message["where"]
        elif kind == "enter":
            self.beat = self.since = now
            self.num_entered += 1
            self.inside, self.limit = message["name"], message["timeout"]
        elif kind == "leave":
            self.beat, self.inside = now, ""
            if message["failure"]:
                self.failed_in, self.failure = self.num_entered, message["failure"]
        elif kind == "done":
            self.is_done, self.inside = True, ""
        elif kind == "ended" and not self.ended:
            self.ended = message["why"]
            # Exceptions in a region are often what another's death looks like.
            raised = self.ended.startswith(RAISED)
            self.ended_order = raised, raised and self.inside != "", now


def differences(peers: list[Peer]) -> str:
    """What the settings of the first differ in from the others', or nothing.

    **Arguments:**

    - `peers`: all, in order.
    """
    first, *others = peers
    found = []
    for peer in others:
        for item in sorted(first.settings.keys() | peer.settings.keys()):
            mine, its = (p.settings.get(item, "nothing") for p in (first, peer))
            if mine != its:
                found.append(f"{peer.name} has {item} {its}, process 0 has {mine}")
    more = len(found) - _MOST_NAMED
    shown = found[:_MOST_NAMED] + ([f"and {more} more"] if more > 0 else [])
    return "; ".join(shown)


def judge(peers: list[Peer], timeout: float, now: float) -> Verdict | None:
    """Why all have to end, if they have to.

    **Arguments:**

    - `peers`: all, in order.
    - `timeout`: seconds of silence.
    - `now`: seconds.
    """
    running = [peer for peer in peers if not peer.is_done]
    ended = [peer for peer in running if peer.ended]
    if ended:
        # The first may be heard of last, after those that lost their connection to it.
        if now - min(peer.ended_order[-1] for peer in ended) < _SETTLED:
            return None
        first = min(ended, key=lambda peer: peer.ended_order)
        return Verdict("RuntimeError", f"{first.name} {first.ended}")
    for peer in running:
        if now - peer.heard > timeout:
            why = f"has not been heard of for {timeout:g} s: its host or network is"
            return Verdict("RuntimeError", f"{peer.name} {why} down, or its monitor")
        if now - peer.beat > timeout:
            text = f"{peer.fault(now, timeout)}: silent for {timeout:g} s"
            return Verdict("RuntimeError", text)
    return _judge_progress(running, now)


def _judge_progress(running: list[Peer], now: float) -> Verdict | None:
    """Those that others wait for."""
    waiting = [peer for peer in running if peer.inside]
    for one, other in zip(waiting, waiting[1:]):
        if one.num_entered == other.num_entered and one.inside != other.inside:
            text = f"{one.name} is in {one.inside!r} where {other.name} is in "
            return Verdict("RuntimeError", f"{text}{other.inside!r}: nobody can go on")
    for peer in waiting:
        if now - peer.since <= peer.limit:
            continue
        late = [p for p in running if p.num_entered < peer.num_entered]
        seconds = f"{peer.limit:g} s"
        if late:
            faults = ", ".join(p.fault(now, peer.limit) for p in late)
            text = f"{faults}: not in {peer.inside!r}, where {peer.name} has waited"
            return Verdict("RuntimeError", f"{text} for {seconds}")
        gone = [p for p in running if p.failed_in == peer.num_entered]
        if gone:
            faults = ", ".join(f"{p.name_and_place} left by {p.failure}" for p in gone)
            text = f"{faults}: {peer.inside!r}, where {peer.name} has waited"
            return Verdict("RuntimeError", f"{text} for {seconds}")
        inside = [p for p in waiting if p.num_entered == peer.num_entered]
        names = ", ".join(p.name_and_place for p in inside)
        text = f"{names} did not get out of {peer.inside!r} for {seconds}"
        return Verdict("RuntimeError", text)
    return None
