"""Showing how far a long reading or writing is: tqdm's bar, where tqdm is installed."""

import sys
import time
from typing import Any, Final

try:
    from tqdm import tqdm  # pyright: ignore[reportMissingModuleSource]
except ImportError:
    tqdm = None

_SECONDS_BETWEEN_LINES: Final = 10.0
_SECONDS_BEFORE_BAR: Final = 2.0


class Progress:
    """Bytes done of a total, on the standard error stream once it has taken seconds."""

    def __init__(self, what: str, total: int):
        """**Arguments:**

        - `what`: is being done.
        - `total`: bytes.
        """
        self._what, self._total, self._done = what, total, 0
        self._shown_at = time.monotonic()
        self._bar: Any = None
        if tqdm is not None:
            self._bar = tqdm(
                desc=what,
                total=total,
                unit="B",
                unit_scale=True,
                delay=_SECONDS_BEFORE_BAR,
            )

    def advance(self, num_bytes: int) -> None:
        """**Arguments:**

        - `num_bytes`: that are done now.
        """
        self._done += num_bytes
        if self._bar is not None:
            self._bar.update(num_bytes)
        elif time.monotonic() - self._shown_at > _SECONDS_BETWEEN_LINES:
            self._shown_at = time.monotonic()
            share = self._done / max(self._total, 1)
            print(f"{self._what}: {share:.0%}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
