"""A JSON file of any size, walked in a memory map: only what is asked for is parsed, one value at a time."""

import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flapp.data.artifact import DataError
from flapp.untrusted import MOST_BYTES, check_regular, parse_json, printable

_SPACE = re.compile(rb"\s*")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)  # possessive: nothing is kept to go back to
_SCALAR = re.compile(rb"[^\s,\[\]{}\"]+")
_MARK = re.compile(rb'["\[\]{}]')


class JsonFile:
    """Walk over a memory-mapped JSON file without building it; `at` is the next byte."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.at = 0
        try:
            size = check_regular(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): copy it again") from error
        if not size:
            raise DataError(f"{path} is empty: copy it again from where LEAF wrote it")
        with path.open("rb") as file:
            self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def members(self) -> Iterator[str]:
        """Yield the keys of the object at `at`; the caller moves past each value before it asks for the next key."""
        self._take(b"{")
        if self._peek() == b"}":
            self._take(b"}")
            return
        while True:
            self._peek()
            key = str(self.load(*self._skip_scalar(_STRING)))
            if not key.isprintable():
                raise DataError(f"{self.path} has control characters in the name {printable(repr(key), 80)}: rename it")
            self._take(b":")
            yield key
            if self._take(b",}") == b"}":
                return

    def skip(self) -> tuple[int, int]:
        """Move past the value at `at` and return where it starts and ends."""
        first = self._peek()
        if first not in (b"{", b"["):
            return self._skip_scalar(_STRING if first == b'"' else _SCALAR)
        start, depth = self.at, 0
        while True:
            match = _MARK.search(self.buffer, self.at)
            if match is None:
                raise self._error("the end of the value")
            self.at = match.end()
            if match[0] == b'"':
                self.at = match.start()
                self._skip_scalar(_STRING)
                continue
            depth += 1 if match[0] in b"{[" else -1
            if depth == 0:
                return start, self.at

    def load(self, start: int, end: int) -> Any:
        """Parse the small value between two bytes."""
        try:
            if end - start > MOST_BYTES:
                raise ValueError(f"a value of {end - start:,} bytes, at most {MOST_BYTES:,} are expected")
            return parse_json(self.buffer[start:end])
        except ValueError as error:
            raise DataError(f"{self.path} is damaged at byte {start} ({error}): copy it again") from error

    def load_list(self, start: int, end: int) -> list[Any]:
        """Parse the list between two bytes."""
        value = self.load(start, end)
        if not isinstance(value, list):
            said = printable(repr(value))
            raise DataError(f"{self.path} holds {said} at byte {start} instead of a list: it is not LEAF JSON")
        return value

    def end(self) -> None:
        """Check that nothing follows."""
        if self._peek():
            raise self._error("the end of the file")

    def release(self) -> None:
        """Let go of the pages read so far, which would otherwise count as this process's memory until it ends."""
        self.buffer.madvise(mmap.MADV_DONTNEED)

    def _peek(self) -> bytes:
        if match := _SPACE.match(self.buffer, self.at):
            self.at = match.end()
        return self.buffer[self.at : self.at + 1]

    def _take(self, wanted: bytes) -> bytes:
        found = self._peek()
        if not found or found not in wanted:
            raise self._error(" or ".join(chr(byte) for byte in wanted))
        self.at += 1
        return found

    def _skip_scalar(self, pattern: re.Pattern[bytes]) -> tuple[int, int]:
        match = pattern.match(self.buffer, self.at)
        if match is None:
            raise self._error("a value")
        self.at = match.end()
        return match.span()

    def _error(self, wanted: str) -> DataError:
        found = self.buffer[self.at : self.at + 12]
        what = f"holds {found!r}" if found else "ends"
        return DataError(f"{self.path} {what} at byte {self.at} instead of {wanted}: it is truncated or not LEAF JSON")
