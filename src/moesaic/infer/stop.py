"""Finding stop strings in text that arrives in pieces, without ever letting part of one through.

scanner = StopScanner(["\\nUser:"])
scanner.push("Hello\\nUs")   # "Hello"; "\\nUs" is held back: it may be the beginning of a stop string
scanner.push("er: more")    # "" and scanner.hit is now True; what follows the stop string is thrown away
"""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.errors import ConfigError


class StopScanner:
    """Lets text through until the first stop string. The outcome does not depend on how the text was cut into pieces.

    First means the one completed first; of two completed by the same character, the longer.
    Raises ``ConfigError`` for an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise ConfigError(f"A stop string must be text of at least one character, but it is {stop!r}.")
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Take the next piece; return the text now known to lie before any stop string."""
        if self.hit:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.hit = True
            return self._release(min(found)[1])
        return self._release(len(self._held) - self._possible_beginning())

    def finish(self) -> str:
        """The text is over: what was held back was no stop string after all."""
        return self._release(len(self._held))

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text that begins some stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], "" if self.hit else self._held[length:]
        return released
