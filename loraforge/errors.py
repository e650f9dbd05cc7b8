"""The errors of the algebra; the root and the rest of the tree are in ``loraforge_registry.errors``.

LoraforgeError
|-- CompositionError (ValueError)      adapters that cannot be combined as asked
|-- FormatError
|   `-- RecipeError                    a recipe or its lock; the message begins with file, line and column
|-- TargetError (ValueError)           modules that cannot be adapted as asked
|-- TrainingError (RuntimeError)       a run that cannot start, or must not go on
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
    "RecipeError",
    "ReferenceSyntaxError",
    "StoreError",
    "TargetError",
    "TrainingError",
]


class CompositionError(LoraforgeError, ValueError):
    """Adapters that cannot be combined as asked; the message says why, and what to do."""

    kind = "cannot_compose"


class RecipeError(FormatError):
    """A recipe that is none, or cannot be followed; the message begins with file, line and column."""


class TargetError(LoraforgeError, ValueError):
    """Modules that cannot be adapted as asked; the message names them, and what to do."""

    kind = "cannot_adapt"


class TrainingError(LoraforgeError, RuntimeError):
    """A training run that cannot start, or must not go on."""

    kind = "cannot_train"


class NumericalError(LoraforgeError, ArithmeticError):
    """A NaN or an infinity; the message names the tensor."""

    kind = "not_finite"
