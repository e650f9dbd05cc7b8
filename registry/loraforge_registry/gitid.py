"""The ids that git gives files: what a Hub says of those that it keeps in git itself."""

import hashlib
from collections.abc import Iterable


def git_id(chunks: Iterable[bytes | bytearray | memoryview], size: int) -> str:
    """Return the git blob id of bytes whose length is known: SHA-1 over ``blob <size>``, a zero byte, and them."""
    sha1 = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for chunk in chunks:
        sha1.update(chunk)
    return sha1.hexdigest()
