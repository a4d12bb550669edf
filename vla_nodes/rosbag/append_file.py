"""An MCAP file that is complete at every moment while it grows, so that a recorder may be killed at any time.

The MCAP format ends a file with a footer, and readers refuse a file without one: a recorder that is killed usually
leaves a file that nothing opens. Here the footer is there from the start. Between the data and the footer lies one
record of an opcode that readers skip, mostly a hole in the file:

    data ... | padding: opcode, length | (room) ................................ | end of data, footer, magic

The next records are written into that room, all but the 9 bytes of opcode and length of the first; behind them goes
the prefix of the padding that remains. When they are on the disk, the 9 bytes that said "padding" are overwritten with
the first record's own: in that one small write the records become part of the file. What was not committed is padding.
"""

from __future__ import annotations

import os
from pathlib import Path

from vla_nodes.rosbag import mcap_records as mcap

ROOM = 16 << 20
"""Bytes by which the file is extended; a hole, which takes no space on the disk."""


class LiveFile:
    """Appends whole records, each append all or nothing. Not thread-safe. OSError is passed on, and the file is then as
    complete as before."""

    def __init__(self, path: Path, library: str, room: int = ROOM) -> None:
        """Create the file; FileExistsError if it is there."""
        self.path = path
        self._step = room
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            begin = mcap.MAGIC + mcap.header(library)
            self._end = len(begin)
            self._room = -1  # no padding yet: the tail stands at the end of the data
            self._write(begin + mcap.TAIL, 0)
            self._sync()
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def end(self) -> int:
        """Where the next record will stand."""
        return self._end

    def append(self, records: bytes) -> None:
        """Add one or more whole records."""
        self._make_room(len(records))
        rest = self._room - len(records)
        self._write(
            records[mcap.PREFIX :] + mcap.prefix(mcap.PADDING, rest),
            self._end + mcap.PREFIX,
        )
        self._sync()  # before the commit: a power cut must not leave the header of a chunk whose data is missing
        self._write(records[: mcap.PREFIX], self._end)
        self._end += len(records)
        self._room = rest

    def finish(self, ending: bytes) -> None:
        """Replace padding and tail by `ending`: the end-of-data record, summary, footer and magic. Closes the file."""
        self._make_room(len(ending))
        self._write(ending[mcap.PREFIX :], self._end + mcap.PREFIX)
        self._sync()
        # With the file cut to length the summary is found from the end, padding or not; only then the last flip.
        os.ftruncate(self._fd, self._end + len(ending))
        self._write(ending[: mcap.PREFIX], self._end)
        self._sync()
        self.close()

    def close(self) -> None:
        """Leave the file as it is: complete, without summary."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _make_room(self, size: int) -> None:
        if size <= self._room:
            return
        before = os.pread(self._fd, mcap.PREFIX, self._end)
        length = os.fstat(self._fd).st_size
        room = size + self._step
        # In this order: padding that reaches past the end is just skipped, a tail in the middle would be read as data.
        self._write(mcap.prefix(mcap.PADDING, room), self._end)
        try:
            self._write(mcap.TAIL, self._end + mcap.PREFIX + room)
        except OSError:
            os.ftruncate(self._fd, length)
            self._write(before, self._end)
            raise
        self._room = room

    def _write(self, data: bytes, at: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, at)
            view, at = view[done:], at + done

    def _sync(self) -> None:
        os.fdatasync(self._fd)
