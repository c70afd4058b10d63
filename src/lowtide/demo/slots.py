"""The variable parts of a request: a phrase, and what that phrase puts into the tool call.

`Slot("the kitchen", {"room": "kitchen"})` is a name to copy; `Slot("half past six in the
evening", {"at": "18:30"})` is a phrase to understand. `GENERIC` holds a sampler per slot name;
a household replaces some of them with its own words (see `lowtide.demo.household`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import NamedTuple

from lowtide.demo import words

Value = str | int


class Slot(NamedTuple):
    """A phrase of the request and the fields that it contributes to the call."""

    text: str
    fields: Mapping[str, Value]


Sampler = Callable[[Random], Slot]
Lexicon = Mapping[str, Sampler]

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")
_DAY_PARTS = (("in the morning", range(5, 12)), ("in the evening", range(17, 22)))


def _person(rng: Random) -> str:
    return rng.choice(words.PEOPLE) if rng.random() < 0.5 else words.pseudo_word(rng)


def _nickname(rng: Random) -> str:
    noun = rng.choice(words.NOUNS)
    return f"{rng.choice(words.ADJECTIVES)} {noun}" if rng.random() < 0.3 else noun


def _room_name(rng: Random) -> str:
    """A room without its article; only about a third are names of ordinary rooms."""
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(words.ROOMS)
    if kind < 0.45:
        return f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.ROOMS)}"
    if kind < 0.60:
        return _nickname(rng)
    if kind < 0.70:
        return words.possessive(_person(rng)) + rng.choice((" room", " bedroom", " office", ""))
    if kind < 0.75:
        return f"{words.pseudo_word(rng)} {rng.choice(('room', 'corner', 'hall', 'suite'))}"
    return words.pseudo_word(rng)


def _room(rng: Random) -> Slot:
    name = _room_name(rng)
    bare = "'s" in name or rng.random() < 0.1
    return Slot(name if bare else f"the {name}", {"room": name})


def _device(rng: Random) -> Slot:
    kind = rng.random()
    if kind < 0.5:
        name = rng.choice(words.DEVICES)
    elif kind < 0.7:
        name = _nickname(rng)
    else:
        name = words.pseudo_word(rng)
    bare = kind > 0.6 and rng.random() < 0.3
    return Slot(name if bare else f"the {name}", {"device": name})


def _mostly(options: Sequence[str], rng: Random, new: float = 0.3) -> str:
    """One of `options`, or with probability `new` a made-up or unexpected word."""
    if rng.random() >= new:
        return rng.choice(options)
    return words.pseudo_word(rng) if rng.random() < 0.7 else rng.choice(words.NOUNS)


def named(key: str, options: Sequence[str], new: float = 0.3) -> Sampler:
    """A name that goes into the call under `key`; with probability `new` not one of `options`."""

    def sample(rng: Random) -> Slot:
        name = _mostly(options, rng, new)
        return Slot(name, {key: name})

    return sample


def _door(rng: Random) -> Slot:
    name = rng.choice(words.DOORS)
    if rng.random() < 0.3:
        name = f"{_mostly(words.NOUNS, rng, 0.6)} {rng.choice(('door', 'gate'))}"
    return Slot(f"the {name}", {"door": name})


def _item(rng: Random) -> Slot:
    name = _mostly(words.ITEMS, rng)
    if rng.random() < 0.2:
        name = f"{words.pseudo_word(rng)} {rng.choice(words.ITEMS)}"
    return Slot(name, {"item": name})


def _several(rng: Random) -> Slot:
    count = rng.randrange(2, 13)
    name = _mostly(words.ITEMS, rng)
    spoken = _NUMBERS[count - 1] if count <= len(_NUMBERS) and rng.random() < 0.4 else str(count)
    unit = rng.choice(("packs of", "bags of", "boxes of", "bottles of", "jars of"))
    return Slot(f"{spoken} {unit} {name}", {"item": name, "count": count})


def _to(rng: Random) -> Slot:
    name = _person(rng)
    return Slot(name, {"to": name})


def filled(options: Sequence[str], new: float = 0.3) -> Sampler:
    """Free text that goes into the call word for word, with names of its own inside."""

    def sample(rng: Random) -> Slot:
        text = rng.choice(options).format(
            person=_person(rng) if new else rng.choice(words.PEOPLE),
            item=_mostly(words.ITEMS, rng, new),
            zone=rng.choice(words.ZONES),
            noun=_mostly(words.NOUNS, rng, new),
            device=rng.choice(words.DEVICES),
        )
        return Slot(text, {"text": text})

    return sample


def _state(rng: Random) -> Slot:
    state = rng.choice(("on", "off"))
    return Slot(state, {"state": state})


def _level(rng: Random) -> Slot:
    level = rng.randrange(5, 101, 5)
    return Slot(f"{level}{rng.choice(('%', '%', ' percent'))}", {"level": level})


def _temp(rng: Random) -> Slot:
    temp = rng.randrange(15, 28)
    return Slot(f"{temp}{rng.choice((' degrees', '', ' c'))}", {"temp": temp})


def _oven_temp(rng: Random) -> Slot:
    temp = rng.randrange(120, 251, 10)
    return Slot(f"{temp}{rng.choice((' degrees', ''))}", {"temp": temp})


def _duration(rng: Random) -> Slot:
    kind = rng.random()
    if kind < 0.65:
        minutes = rng.randrange(2, 61)
        return Slot(f"{minutes} {rng.choice(('minutes', 'min'))}", {"for": f"{minutes}m"})
    if kind < 0.75:
        hours = rng.randrange(2, 10)
        return Slot(f"{hours} hours", {"for": f"{hours}h"})
    if kind < 0.85:
        seconds = rng.randrange(10, 100, 5)
        return Slot(f"{seconds} seconds", {"for": f"{seconds}s"})
    text, value = rng.choice(
        (("an hour", "1h"), ("half an hour", "30m"), ("an hour and a half", "90m"))
    )
    return Slot(text, {"for": value})


def _clock(rng: Random) -> Slot:
    """A time of day as people say it, and as `HH:MM`."""
    hour, minute = rng.randrange(5, 24), rng.choice((0, 0, 0, 15, 30, 45, rng.randrange(0, 60, 5)))
    twelve = (hour + 11) % 12 + 1
    kind = rng.random()
    if kind < 0.06:
        text, hour, minute = rng.choice((("noon", 12, 0), ("midnight", 0, 0)))
    elif kind < 0.70:
        half = "am" if hour < 12 else "pm"
        shown = f"{twelve}" if minute == 0 else f"{twelve}:{minute:02d}"
        text = f"{shown}{rng.choice((' ', ''))}{half}"
    elif kind < 0.82:
        text = f"{hour:02d}:{minute:02d}"
    else:
        part, hours = rng.choice(_DAY_PARTS)
        hour = rng.choice(hours)
        twelve = (hour + 11) % 12 + 1
        said = _NUMBERS[twelve - 1] if rng.random() < 0.5 else str(twelve)
        before, minute = rng.choice((("", 0), ("half past ", 30), ("quarter past ", 15)))
        text = f"{before}{said} {part}"
    return Slot(text, {"at": f"{hour:02d}:{minute:02d}"})


def _day(rng: Random) -> Slot:
    day = rng.choice(words.DAY_WORDS)
    spoken = f"on {day}" if day in words.DAYS else day
    return Slot(spoken, {"day": day})


def _days(rng: Random) -> Slot:
    text, value = rng.choice(
        (
            ("every day", "daily"),
            ("on weekdays", "weekdays"),
            ("at weekends", "weekends"),
            *((f"every {day}", day) for day in words.DAYS),
        )
    )
    return Slot(text, {"days": value})


def when(rng: Random, lexicon: Lexicon) -> Slot:
    """When to act: a clock time, a day and a time, or a delay."""
    kind = rng.random()
    if kind < 0.2:
        delay = _duration(rng)
        return Slot(f"in {delay.text}", {"in": delay.fields["for"]})
    clock = lexicon["clock"](rng)
    if kind < 0.75:
        return Slot(f"at {clock.text}", clock.fields)
    day = _day(rng)
    text = rng.choice((f"at {clock.text} {day.text}", f"{day.text} at {clock.text}"))
    return Slot(text, {**clock.fields, **day.fields})


GENERIC: Lexicon = {
    "room": _room,
    "device": _device,
    "door": _door,
    "item": _item,
    "several": _several,
    "list": named("list", words.LISTS),
    "to": _to,
    "message": filled(words.MESSAGES),
    "task": filled(words.TASKS),
    "music": named("what", words.MUSIC, 0.4),
    "tune": named("music", words.MUSIC, 0.4),
    "show": named("what", words.SHOWS),
    "place": named("place", words.PLACES, 0.5),
    "zone": named("zone", words.ZONES),
    "timer": named("name", words.TIMER_NAMES),
    "color": named("color", words.COLORS, 0.0),
    "onoff": _state,
    "level": _level,
    "temp": _temp,
    "oven": _oven_temp,
    "duration": _duration,
    "clock": _clock,
    "day": _day,
    "days": _days,
}
