"""What happens to files: bytes that flip, disks that fill, and how much of a mapped one is in memory."""

import errno
import os
from pathlib import Path


def resident(path):
    """Bytes of the mappings of a file that are in this process's memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and not line[0].isupper():
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def failing_write(monkeypatch, after, number=errno.ENOSPC):
    """A disk that takes ``after`` bytes, half of the write that exceeds them, and then no more."""
    written, write = [0], os.write

    def fail(file, data):
        if written[0] + len(data) > after:
            if written[0] < after:
                data, written[0] = data[: len(data) // 2], after
                return write(file, data)
            raise OSError(number, os.strerror(number))
        written[0] += len(data)
        return write(file, data)

    monkeypatch.setattr(os, "write", fail)
