"""The variable parts of a request: a phrase, and what that phrase puts into the tool call.

`Slot("the kitchen", {"room": "kitchen"})` is a name to copy; `Slot("half past six in the
evening", {"at": "18:30"})` is a phrase to understand. A lexicon holds a sampler per slot name; a
household replaces some of them with its own words (see `lowtide.demo.household`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
_MINUTES = (0, 0, 0, 0, 0, 0, 15, 15, 30, 30, 30, 45, 45, 5, 10, 20, 40, 50)
_DAY_PARTS = (("in the morning", range(5, 12)), ("in the evening", range(17, 22)))


@dataclass(frozen=True)
class Names:
    """Samplers of names; a share `new` of the names is made up and was never seen before."""

    new: float

    def one_of(self, options: Sequence[str], rng: Random) -> str:
        """One of `options`, or a made-up word."""
        return words.pseudo_word(rng) if rng.random() < self.new else rng.choice(options)

    def person(self, rng: Random) -> str:
        """A first name, or `mum` and the like."""
        return self.one_of(words.PEOPLE, rng)

    def room(self, rng: Random) -> Slot:
        """A room: an ordinary one, one with an adjective, a nickname, or somebody's."""
        kind = rng.random()
        if kind < 0.50:
            name = self.one_of(words.ROOMS, rng)
        elif kind < 0.65:
            name = f"{rng.choice(words.ADJECTIVES)} {self.one_of(words.ROOMS, rng)}"
        elif kind < 0.85:
            name = self.nickname(rng)
        elif kind < 0.95:
            suffix = rng.choice((" room", " bedroom", " office", ""))
            name = f"{self.person(rng)}'s{suffix}"
        else:
            suffix = rng.choice(("room", "corner", "hall", "suite"))
            name = f"{self.one_of(words.NOUNS, rng)} {suffix}"
        bare = "'s" in name or rng.random() < 0.1
        return Slot(name if bare else f"the {name}", {"room": name})

    def nickname(self, rng: Random) -> str:
        """A noun that is no room and no device, sometimes with an adjective."""
        noun = self.one_of(words.NOUNS, rng)
        return f"{rng.choice(words.ADJECTIVES)} {noun}" if rng.random() < 0.3 else noun

    def device(self, rng: Random) -> Slot:
        """An appliance, or the nickname of one."""
        ordinary = rng.random() < 0.7
        name = self.one_of(words.DEVICES, rng) if ordinary else self.nickname(rng)
        bare = not ordinary and rng.random() < 0.3
        return Slot(name if bare else f"the {name}", {"device": name})

    def door(self, rng: Random) -> Slot:
        """A door or a gate."""
        name = rng.choice(words.DOORS)
        if rng.random() < 0.3:
            name = f"{self.one_of(words.NOUNS, rng)} {rng.choice(('door', 'gate'))}"
        return Slot(f"the {name}", {"door": name})

    def item(self, rng: Random) -> Slot:
        """Something for a list, sometimes with a brand."""
        name = self.one_of(words.ITEMS, rng)
        if rng.random() < self.new / 2:
            name = f"{words.pseudo_word(rng)} {rng.choice(words.ITEMS)}"
        return Slot(name, {"item": name})

    def several(self, rng: Random) -> Slot:
        """A number of packets of something, the number in digits or as a word."""
        count = rng.randrange(2, 13)
        name = self.one_of(words.ITEMS, rng)
        as_word = count <= len(_NUMBERS) and rng.random() < 0.4
        unit = rng.choice(("packs of", "bags of", "boxes of", "bottles of", "jars of"))
        said = _NUMBERS[count - 1] if as_word else str(count)
        return Slot(f"{said} {unit} {name}", {"item": name, "count": count})

    def to(self, rng: Random) -> Slot:
        """Whom to call or to tell."""
        name = self.person(rng)
        return Slot(name, {"to": name})

    def named(self, key: str, options: Sequence[str]) -> Sampler:
        """A sampler of names that go into the call under `key`."""

        def sample(rng: Random) -> Slot:
            name = self.one_of(options, rng)
            return Slot(name, {key: name})

        return sample

    def filled(self, options: Sequence[str]) -> Sampler:
        """A sampler of text that goes into the call word for word, with names of its own."""

        def sample(rng: Random) -> Slot:
            text = rng.choice(options).format(
                person=self.person(rng),
                item=self.one_of(words.ITEMS, rng),
                zone=rng.choice(words.ZONES),
                noun=self.one_of(words.NOUNS, rng),
                device=rng.choice(words.DEVICES),
            )
            return Slot(text, {"text": text})

        return sample

    def speech(self, longest: int) -> Sampler:
        """A sampler of words without sense, to be repeated exactly: pure copying."""
        pools = (words.NOUNS, words.ADJECTIVES, words.ROOMS, words.PEOPLE, words.ITEMS)

        def sample(rng: Random) -> Slot:
            count = rng.randrange(2, longest + 1)
            text = " ".join(self.one_of(rng.choice(pools), rng) for _ in range(count))
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
    hour, minute = rng.randrange(5, 24), rng.choice(_MINUTES)
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


def lexicon(new: float, longest_speech: int = 4) -> dict[str, Sampler]:
    """A sampler per slot name; a share `new` of the names is made up."""
    names = Names(new)
    return {
        "room": names.room,
        "device": names.device,
        "door": names.door,
        "item": names.item,
        "several": names.several,
        "list": names.named("list", words.LISTS),
        "to": names.to,
        "message": names.filled(words.MESSAGES),
        "task": names.filled(words.TASKS),
        "speech": names.speech(longest_speech),
        "music": names.named("what", words.MUSIC),
        "tune": names.named("music", words.MUSIC),
        "show": names.named("what", words.SHOWS),
        "place": names.named("place", words.PLACES),
        "zone": names.named("zone", words.ZONES),
        "timer": names.named("name", words.TIMER_NAMES),
        "color": Names(0.0).named("color", words.COLORS),
        "onoff": _state,
        "level": _level,
        "temp": _temp,
        "oven": _oven_temp,
        "duration": _duration,
        "clock": _clock,
        "day": _day,
        "days": _days,
    }


ORDINARY: Lexicon = lexicon(0.0)
"""Names that a person would use: ordinary ones, and nouns and adjectives as nicknames."""

GENERIC: Lexicon = lexicon(0.3)
"""The same with three names in ten made up; what the base model is trained on."""

DRILL: Lexicon = lexicon(0.5, longest_speech=7)
"""For the copying exercises at the beginning of pretraining."""
