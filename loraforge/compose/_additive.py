"""When adapters can be added at all, and what of them that is not a delta the sum can keep."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from loraforge.adapter import Adapter, same_tensor
from loraforge.errors import CompositionError
from loraforge_registry.config import Settings

Term = tuple[Adapter, float]


def check_additive(adapter: Adapter) -> None:
    """Refuse an adapter whose function is not its base plus ``scale * B @ A``, or that holds no numbers.

    Raises:
        CompositionError: DoRA, or an initialisation that rewrites the base.
        NumericalError: NaN or infinity, named.
    """
    if adapter.settings.base_mutating_init:
        raise CompositionError(
            f"the adapter was saved with init_lora_weights={adapter.settings.base_mutating_init!r}: PEFT rewrites the "
            "base when it loads it, so its factors alone are not its delta; save it again with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    check_finite(adapter)
    for name, pair in adapter.targets.items():
        if pair.magnitude is not None:
            raise CompositionError(
                f"target {name!r} has a DoRA magnitude, which renormalises base and delta together: such deltas do not "
                "add up; merge the adapter into its base, or train it without use_dora"
            )


def check_finite(adapter: Adapter) -> None:
    """Refuse NaN and infinity in any factor.

    Raises:
        NumericalError: named.
    """
    for name, pair in adapter.targets.items():
        pair.check_finite(name)


def common_settings(terms: Sequence[Term], base: str | None) -> Settings:
    """Return the settings that a sum has: the base of all, and what they agree on.

    Raises:
        CompositionError: different bases, or layouts of their weights.
    """
    settings = [adapter.settings for adapter, _ in terms]
    for what, values in (
        ("fan_in_fan_out", {s.fan_in_fan_out for s in settings}),
        ("ensure_weight_tying", {s.weight_tying for s in settings}),
    ):
        if len(values) > 1:
            raise CompositionError(f"the adapters differ in {what}: they belong to differently built bases")
    names = sorted({s.base_name for s in settings if s.base_name})
    if base is None and len(names) > 1:
        raise CompositionError(
            f"the adapters name different bases, {names[0]!r} and {names[1]!r}; if they are one model, say which "
            "name the result shall carry (base=, --base)"
        )
    first = settings[0]
    revisions = {s.base_revision for s in settings}
    tasks = {s.task_type for s in settings}
    return Settings(
        base_name=base or (names[0] if names else None),
        base_revision=first.base_revision if base is None and len(revisions) == 1 else None,
        task_type=first.task_type if len(tasks) == 1 else None,
        fan_in_fan_out=first.fan_in_fan_out,
        weight_tying=first.weight_tying,
    )


def common_extras(terms: Sequence[Term], settings: Settings) -> tuple[Mapping[str, Tensor], Settings]:
    """Return the whole tensors that a sum keeps, and its settings with what announces them.

    They replace weights of the base, so a weighted sum of them is not known without it: they stay only if every
    adapter has the same ones and the weights add up to one.

    Raises:
        CompositionError: they differ, or the weights do not add up to one.
    """
    first = terms[0][0]
    if not any(adapter.extras for adapter, _ in terms):
        return {}, settings
    for adapter, _ in terms[1:]:
        different = sorted(
            k for k in {*first.extras, *adapter.extras} if not same_tensor(first.extras.get(k), adapter.extras.get(k))
        )
        if different or adapter.settings.token_indices != first.settings.token_indices:
            what = different[0] if different else "trainable_token_indices"
            raise CompositionError(
                f"the adapters differ in {what!r}, which replaces a weight of the base instead of adding to it, so no "
                "sum is defined; leave such tensors out (drop_saved=True, --drop-saved), or merge into the base"
            )
    total = sum(weight for _, weight in terms)
    if abs(total - 1) > 1e-9:
        raise CompositionError(
            f"the adapters hold {min(first.extras)!r}, which replaces a weight of the base: that is defined only "
            f"for weights that add up to 1, these add up to {total:g}; leave such tensors out (drop_saved=True, "
            "--drop-saved)"
        )
    kept = first.settings
    return first.extras, replace(
        settings, modules_to_save=kept.modules_to_save, token_indices=kept.token_indices, bias=kept.bias
    )


def without_extras(adapter: Adapter) -> Adapter:
    """Return the adapter without the tensors that replace weights of the base."""
    # PEFT adds modules_to_save of its own for a task with a head, and then misses their tensors
    task = None if adapter.settings.modules_to_save else adapter.settings.task_type
    settings = replace(adapter.settings, modules_to_save=(), token_indices={}, bias="none", task_type=task)
    return replace(adapter, extras={}, settings=settings)
