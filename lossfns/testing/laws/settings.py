"""The settings of a loss under test, which laws read and change."""

from __future__ import annotations

from dataclasses import replace

from lossfns.testing.laws.base import LawBroken, LossFn, NotApplicable, Probe, uniform_batch, unit_size


def setting_named(loss_fn: LossFn, *names: str) -> tuple[str, float] | None:
    """Return name and value of the first numeric setting that has one of these names, or None."""
    from lossfns.testing.subject import knobs

    for name, value in knobs(loss_fn).items():
        if name.lower() in names and isinstance(value, (int, float)) and not isinstance(value, bool):
            return name, float(value)
    return None


def setting_of(loss_fn: LossFn, why: str, *names: str) -> tuple[str, float]:
    """Return name and value of the first numeric setting with one of these names. Raise NotApplicable without one."""
    found = setting_named(loss_fn, *names)
    if found is None:
        raise NotApplicable(why)
    return found


def with_setting(probe: Probe, name: str, value: float) -> Probe:
    """Return the probe of the loss with another setting. Raise NotApplicable where the loss refuses it."""
    from lossfns.testing.subject import with_settings

    try:
        other = replace(probe, loss_fn=with_settings(probe.loss_fn, **{name: value}))
        other(uniform_batch(probe.batch, length=2, datums=unit_size(probe.batch)))
    except (LawBroken, TypeError, ValueError) as refusal:
        raise NotApplicable(f"it refuses {name} = {value:g}") from refusal
    return other
