"""Figures and events of a run, as people read them."""

from __future__ import annotations

from typing import Any

from .lines import number

GAP = "\N{EN DASH}"


def value_in(value: float | None) -> str:
    """A loss, say: four figures, or a dash."""
    return GAP if value is None else f"{value:.4g}"


def rate_in(value: float) -> str:
    """A learning rate: `2.5e-4`."""
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}" if value else "0"


def count_in(value: float | None) -> str:
    """A whole number."""
    return GAP if value is None else f"{value:,.0f}"


def bytes_in(value: Any) -> str:
    """Bytes as MB or GB of 10^6 and 10^9."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return GAP
    return f"{value / 1e9:,.2f} GB" if value >= 1e10 else f"{value / 1e6:,.1f} MB"


def seconds_in(value: float | None) -> str:
    """Seconds as `1h 02m`, `3m 04s` or `5.6s`."""
    if value is None:
        return GAP
    if value >= 3600:
        return f"{int(value // 3600)}h {int(value % 3600 // 60):02d}m"
    return f"{int(value // 60)}m {int(value % 60):02d}s" if value >= 60 else f"{value:.1f}s"


def when(event: dict[str, Any]) -> str:
    """The time of an event: `2026-11-24 22:00:05 UTC`."""
    return str(event.get("time", GAP)).replace("T", " ").replace("+00:00", " UTC")


def event_words(event: dict[str, Any]) -> str:
    """One line about an event, its own text included as it stands."""
    kind = event["event"]
    at = f"{when(event)}, step {count_in(number(event, 'step'))}: "
    if kind == "warning":
        return f"{at}warning: {event.get('message')}"
    if kind == "paused":
        return f"{at}paused: {event.get('reason')}"
    if kind == "went on":
        return f"{at}went on after {_seconds(event, 'paused_s')}"
    if kind == "end":
        cost = f"{_seconds(event, 'elapsed_s')} in all, {_seconds(event, 'cpu_s')} CPU"
        error = f": {event['error']}" if event.get("error") else ""
        return f"{at}{event.get('state')} ({cost}){error}"
    if kind == "start":
        return f"{at}{'taken up again' if event.get('step') else 'started'}"
    return f"{at}{kind}"


def _seconds(event: dict[str, Any], key: str) -> str:
    return seconds_in(number(event, key))
