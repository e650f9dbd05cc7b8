"""The errors of the algebra; the root and the rest of the tree are in ``loraforge_registry.errors``.

LoraforgeError
|-- CompositionError (ValueError)      adapters that cannot be combined as asked
`-- NumericalError (ArithmeticError)   NaN or infinity among the numbers
"""

from loraforge_registry.errors import (
    ConfigError,
    ConflictError,
    FormatError,
    HeaderError,
    InputOutputError,
    KeyMismatchError,
    LoraforgeError,
    ManifestError,
    NotFoundError,
    ReferenceSyntaxError,
    StoreError,
)

__all__ = [
    "CompositionError",
    "ConfigError",
    "ConflictError",
    "FormatError",
    "HeaderError",
    "InputOutputError",
    "KeyMismatchError",
    "LoraforgeError",
    "ManifestError",
    "NotFoundError",
    "NumericalError",
    "ReferenceSyntaxError",
    "StoreError",
]


class CompositionError(LoraforgeError, ValueError):
    """Adapters that cannot be combined as asked; the message says why, and what to do."""

    kind = "cannot_compose"


class NumericalError(LoraforgeError, ArithmeticError):
    """A NaN or an infinity; the message names the tensor."""

    kind = "not_finite"
