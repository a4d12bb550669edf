"""How much a recording may ask of the computer that reads it, so that a small hostile file cannot take all of it."""

from __future__ import annotations


class TooLarge(ValueError):
    """The file asks for more memory or time than is allowed here. One line."""


MAX_MESSAGE = 256 << 20
"""Bytes of one message; a 4K RGB image takes 25 MB."""
MAX_CHUNK = 256 << 20
"""Bytes of one MCAP chunk, unpacked; rosbag2 writes chunks of 1 MB, or of one message where that is larger."""
MAX_OPEN = 384 << 20
"""Bytes of the chunks that are unpacked at the same time because they overlap in time."""
MAX_DEFINITIONS = 32 << 20
"""Bytes of all message definitions and topic names of one file."""
MAX_DEFINITION = 256 << 10
"""Bytes of the one definition that is parsed; the largest of ROS 2 takes 30 kB."""


def most_unpacked(size: int) -> int:
    """Bytes to which a file of `size` bytes may unpack in all: images of one colour shrink to a fiftieth."""
    return (1 << 30) + 100 * size


def most_records(size: int) -> int:
    """Records that a file of `size` bytes may hold: a message that tells something new takes more than 16 bytes."""
    return 2_000_000 + size // 16


class Records:
    """Counts the records of a file of `size` bytes, so that one that consists of little else does not take hours."""

    def __init__(self, size: int) -> None:
        self._left = self._most = most_records(size)

    def take(self) -> None:
        """One more. Raises TooLarge."""
        self._left -= 1
        if self._left < 0:
            raise TooLarge(f"more than {self._most} records")
