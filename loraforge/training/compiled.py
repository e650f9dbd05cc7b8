"""``torch.compile`` for a run: the model's own call is compiled, and what cannot be is said in a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from loraforge.errors import TrainingError


@contextmanager
def compiled(model: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Compile ``model`` at its first call inside, if it is ``wanted``; at the end it is as it was.

    Numerics: fused kernels round otherwise than separate ones; losses agree to the type's rounding, not to the bit.

    Raises:
        TrainingError: it cannot be compiled here (no C++ compiler, or an operation that torch does not compile).
    """
    if not wanted:
        yield
        return
    import torch._dynamo.exc as tracing  # noqa: PLC0415 - they take a second, and few runs want them
    import torch._inductor.exc as lowering  # noqa: PLC0415 - as above

    inductor: type[Exception] = getattr(lowering, "InductorError", tracing.TorchDynamoException)
    module: Any = model
    model.compile()
    try:
        yield
    except (tracing.TorchDynamoException, inductor) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TrainingError(
            f"torch.compile cannot compile this model here ({reason[:200]}); leave compile out"
        ) from error
    finally:
        module._compiled_call_impl = None  # noqa: SLF001 - torch has no public way back
