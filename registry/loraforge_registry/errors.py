"""Every error of the project, from one root.

    LoraforgeError
    |-- FormatError (ValueError)             bytes that are not what they should be
    |   |-- HeaderError                      a safetensors header or file
    |   |-- ConfigError                      an adapter_config.json
    |   |-- KeyMismatchError                 tensors that the config does not account for, or the reverse
    |   `-- ManifestError                    a manifest, or any canonical msgpack
    |-- ReferenceSyntaxError (ValueError)    a name, tag, digest or reference that cannot be one
    |-- NotFoundError (LookupError)          nothing has this name, digest or path
    |-- ConflictError                        the place is taken, or a ref moved meanwhile
    |-- StoreError                           a store that is not one, or is damaged
    |   `-- DigestMismatchError              bytes that are not those their digest promises
    |-- RemoteError (ConnectionError)        a remote that cannot be reached, or answers what it must not
    |-- InputOutputError (OSError)           the operating system said no
    `-- (loraforge.errors adds those of the algebra)

``kind`` is the stable word for scripts (the command line's ``--json`` prints it).
"""

from typing import ClassVar


class LoraforgeError(Exception):
    """The root: ``except LoraforgeError`` catches what loraforge says no to, and nothing else."""

    kind: ClassVar[str] = "error"


class FormatError(LoraforgeError, ValueError):
    """Bytes or values that are not what the format asks for."""

    kind = "bad_format"


class HeaderError(FormatError):
    """A safetensors file that the header gate refuses."""


class ConfigError(FormatError):
    """An adapter configuration that is wrong, or that loraforge does not model."""


class KeyMismatchError(FormatError):
    """Tensors and configuration that do not account for each other."""


class ManifestError(FormatError):
    """A manifest, or other canonical msgpack, that is malformed."""


class ReferenceSyntaxError(LoraforgeError, ValueError):
    """A name, tag, digest or reference with a spelling that cannot be one."""

    kind = "bad_reference"


class NotFoundError(LoraforgeError, LookupError):
    """Nothing has this name, digest or path."""

    kind = "not_found"


class ConflictError(LoraforgeError):
    """The place is taken, or a ref is not what the caller expected it to be."""

    kind = "conflict"


class StoreError(LoraforgeError):
    """A directory that is not a store, or a store whose contents are damaged."""

    kind = "bad_store"


class DigestMismatchError(StoreError):
    """Bytes that came, and are not those that their digest promises."""


class RemoteError(LoraforgeError, ConnectionError):
    """A remote that cannot be reached, does not let us in, or answers what it must not."""

    kind = "remote"


class InputOutputError(LoraforgeError, OSError):
    """The operating system refused to read or write."""

    kind = "io"
