"""Fingerprints of data files, to know the files that a checkpoint's data position belongs to.

Neither the time of a file nor the folders above it count, so a copy elsewhere is the same file.
"""

import hashlib
import os
from pathlib import Path

# A file up to this size is read whole; of a larger one BLOCKS blocks of BLOCK bytes are, evenly
# spaced, the first and the last among them. Changing any of these outdates all checkpoints.
WHOLE = 4 * 2**20
BLOCKS, BLOCK = 16, 64 * 2**10


def fingerprint(path: Path) -> str:
    """16 hexadecimal digits, of the size and of (parts of) the content. Raises OSError."""
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"{size} bytes".encode())
        if size <= WHOLE:
            digest.update(file.read())
        else:
            for n in range(BLOCKS):
                file.seek((size - BLOCK) * n // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
