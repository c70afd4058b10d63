"""Household requests in English and the JSON tool call that each one asks for.

    "please turn off the kitchen lights at 9 pm"
    {"tool":"lights.set","room":"kitchen","state":"off","at":"21:00"}

Calls are compact JSON with their keys in the order of `KEYS`, so that an answer is either
exactly right or wrong. Everything is drawn from a seed: the same seed gives the same requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal, NamedTuple

from lowtide.demo.slots import GENERIC, Lexicon, Value, when

KEYS = (
    "tool", "device", "room", "door", "list", "item", "count", "to", "text", "what", "place",
    "zone", "name", "state", "level", "color", "temp", "blinds", "music", "for", "days",
    "at", "in", "day",
)  # fmt: skip
"""Every key of a call, in the order in which an answer writes them."""


class Example(NamedTuple):
    """One request and its call. `core` is the request without courtesies and punctuation."""

    prompt: str
    completion: str
    core: str


@dataclass(frozen=True)
class Template:
    """Ways to ask for one call.

    A pattern has slots in braces and alternatives in brackets: `[turn|switch] {onoff} {room}
    lights`. `timing` says whether a time may or must be added.
    """

    tool: str
    patterns: Sequence[str]
    timing: Literal["never", "maybe", "always"] = "never"
    fixed: Mapping[str, Value] = field(default_factory=dict)
    weight: float = 1.0


ANNOUNCE = Template("announce", ("[announce|say] {speech}", "announce in {room}: {speech}"))
"""The tool whose calls are nearly all copied; pretraining drills it."""

TEMPLATES: tuple[Template, ...] = (
    Template(
        "lights.set",
        (
            "[turn|switch] {onoff} {room} [lights|light]",
            "[turn|switch] {room} [lights|light] {onoff}",
            "[turn|switch] {onoff} the [lights|light] in {room}",
            "lights {onoff} in {room}",
            "{room} lights {onoff}",
        ),
        "maybe",
        weight=2.0,
    ),
    Template(
        "lights.set",
        (
            "[dim|set|bring] {room} [lights|light] to {level}",
            "[dim|set] the [lights|light] in {room} to {level}",
            "{room} lights [at|to] {level}",
        ),
        "maybe",
        weight=1.5,
    ),
    Template(
        "lights.set",
        ("[make|turn] {room} [lights|light] {color}", "{color} light in {room}"),
        "maybe",
    ),
    Template(
        "lights.set", ("[turn|switch] {onoff} all the lights",), "maybe", {"room": "all"}, 0.2
    ),
    Template("device.set", ("[turn|switch] {onoff} {device}", "{device} {onoff}"), "maybe"),
    Template("device.set", ("[turn|switch] {onoff} {device} in {room}",), "maybe", weight=1.5),
    Template(
        "device.set",
        ("[start|wake up|fire up] {device}", "get {device} [going|running]"),
        "maybe",
        {"state": "on"},
    ),
    Template(
        "device.set",
        ("[stop|shut down|kill] {device}", "put {device} to sleep"),
        "maybe",
        {"state": "off"},
    ),
    Template(
        "heat.set",
        (
            "[set|heat|warm|cool] {room} to {temp}",
            "set the [heating|thermostat] in {room} to {temp}",
            "[make it|i want] {temp} in {room}",
        ),
        "maybe",
        weight=1.5,
    ),
    Template(
        "timer.start",
        (
            "[set|start] a timer for {duration}",
            "[set|start] a {duration} timer",
            "timer {duration}",
        ),
        weight=0.6,
    ),
    Template(
        "timer.start",
        ("[set|start] a {timer} timer for {duration}", "{timer} timer for {duration}"),
        weight=0.8,
    ),
    Template(
        "alarm.set",
        ("wake me [up|] at {clock}", "set an alarm for {clock}", "wake me [up|] at {clock} {day}"),
        weight=0.7,
    ),
    Template(
        "alarm.set",
        ("wake me [up|] at {clock} {days}", "set an alarm for {clock} {days}"),
        weight=0.7,
    ),
    Template("music.play", ("[play|put on] {music}", "[play|put on] [some|] {music} in {room}")),
    Template(
        "music.play",
        ("play {music} in {room} at {level} [volume|]", "{music} in {room} at {level}"),
    ),
    Template(
        "music.stop", ("[stop|pause] the music in {room}", "[no more|silence] music in {room}")
    ),
    Template("volume.set", ("[set|turn] the volume in {room} to {level}", "{room} volume {level}")),
    Template("list.add", ("[add|put] {item} [to|on] [the|my|our] {list} list",)),
    Template("list.add", ("[add|put] {several} [to|on] [the|my|our] {list} list",)),
    Template(
        "list.add",
        ("we [need|are out of] {item}", "[buy|get] [more|some] {item}", "we ran out of {item}"),
        fixed={"list": "shopping"},
    ),
    Template(
        "blinds.set",
        ("[open|raise] {room} blinds", "open the blinds in {room}"),
        "maybe",
        {"state": "open"},
    ),
    Template(
        "blinds.set",
        ("[close|lower|shut] {room} blinds", "[close|shut] the blinds in {room}"),
        "maybe",
        {"state": "closed"},
    ),
    Template("blinds.set", ("[set|move] {room} blinds to {level}",), "maybe", weight=0.7),
    Template("lock.set", ("lock {door}", "lock up {door}"), "maybe", {"state": "locked"}),
    Template("lock.set", ("unlock {door}",), "maybe", {"state": "unlocked"}),
    Template(
        "vacuum.start", ("[vacuum|hoover] {room}", "[run|send] the vacuum [in|to] {room}"), "maybe"
    ),
    Template("vacuum.stop", ("[stop|dock|park] the vacuum", "vacuum home"), "maybe", weight=0.2),
    Template("reminder.add", ("remind me to {task}",), "always", weight=2.0),
    Template("reminder.add", ("remind me to {task} {day}",), weight=0.5),
    Template(
        "message.send",
        ("tell {to} [that|] {message}", "[send|text] {to}: {message}", "let {to} know {message}"),
        weight=2.0,
    ),
    ANNOUNCE,
    Template("call.start", ("[call|phone|ring] {to}", "get {to} on the phone"), "maybe"),
    Template(
        "weather.get",
        ("[what is|how is] the weather in {place} {day}", "weather [for|in] {place} {day}"),
    ),
    Template("water.start", ("water the {zone} for {duration}",), "maybe"),
    Template("oven.set", ("[preheat|heat] the oven to {oven}", "oven [to|at] {oven}"), "maybe"),
    Template(
        "scene.set",
        (
            "[dim|set] {room} to {level} and [close|shut] the blinds",
            "{room} at {level} with the blinds [closed|down]",
        ),
        "maybe",
        {"blinds": "closed"},
    ),
    Template(
        "scene.set",
        (
            "[dim|set] {room} to {level}, [close|shut] the blinds and play {tune}",
            "{room} at {level}, blinds [closed|down], {tune} playing",
        ),
        "maybe",
        {"blinds": "closed"},
        0.7,
    ),
    Template(
        "scene.set",
        (
            "set {room} to {level} and open the blinds",
            "{room} at {level} with the blinds [open|up]",
        ),
        "maybe",
        {"blinds": "open"},
        0.7,
    ),
    Template("tv.play", ("[put|show] {show} on the tv in {room}", "watch {show} in {room}")),
)

TOOLS = tuple(dict.fromkeys(template.tool for template in TEMPLATES))
"""Every tool that a call can name."""

_ALTERNATIVES = re.compile(r"\[([^\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_BEFORE = ("please ", "can you ", "could you ", "hey, ", "ok, ", "would you ", "i need you to ")
_BEFORE_ANYTHING = ("hey, ", "ok, ", "listen, ", "so, ", "well, ")
_VERBS = frozenset(
    """add announce bring buy call cancel close cool dim dock fire get give heat hoover kill let
    lock lower make move open park pause phone play preheat put raise remind ring run say send
    set show shut silence start stop switch tell text turn unlock vacuum wake warm watch
    water""".split()
)
_AFTER = (" please", ", please", " thanks", ".", "!", "?", ", ok?")
_TRIES = 1000


def call_json(fields: Mapping[str, Value]) -> str:
    """The call as compact JSON, its keys in the order of `KEYS`."""
    ordered = {key: fields[key] for key in KEYS if key in fields}
    return json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))


def exact_match(answer: str, expected: str) -> bool:
    """Whether two calls are the same text, apart from white space around them."""
    return answer.strip() == expected.strip()


def _render(
    template: Template, rng: Random, lexicon: Lexicon
) -> tuple[str, dict[str, Value]] | None:
    """The request's core and its call; None where two slots speak of the same field."""
    pattern = _ALTERNATIVES.sub(
        lambda found: rng.choice(found[1].split("|")), rng.choice(template.patterns)
    )
    call: dict[str, Value] = {"tool": template.tool, **template.fixed}
    for name in _SLOT.findall(pattern):
        slot = lexicon[name](rng)
        if call.keys() & slot.fields.keys():
            return None
        call.update(slot.fields)
        pattern = pattern.replace(f"{{{name}}}", slot.text, 1)
    if template.timing == "always" or (template.timing == "maybe" and rng.random() < 0.35):
        moment = when(rng, lexicon)
        if call.keys() & moment.fields.keys():
            return None
        call.update(moment.fields)
        first = rng.random() < 0.2
        pattern = f"{moment.text} {pattern}" if first else f"{pattern} {moment.text}"
    return " ".join(pattern.split()), call


def _politely(core: str, rng: Random) -> str:
    """The request with the courtesies, capitals and punctuation that people add."""
    openings = _BEFORE if core.split()[0] in _VERBS else _BEFORE_ANYTHING
    before = rng.choice(openings) if rng.random() < 0.3 else ""
    after = rng.choice(_AFTER) if rng.random() < 0.35 else ""
    text = f"{before}{core}{after}"
    return text[0].upper() + text[1:] if rng.random() < 0.2 else text


def example(
    rng: Random, lexicon: Lexicon = GENERIC, templates: Sequence[Template] = TEMPLATES
) -> Example:
    """One request, drawn from `rng`."""
    weights = [template.weight for template in templates]
    for _ in range(_TRIES):
        rendered = _render(rng.choices(templates, weights)[0], rng, lexicon)
        if rendered is not None:
            core, call = rendered
            return Example(_politely(core, rng), call_json(call), core)
    raise AssertionError("these templates and slots never fit together")


def stream(
    seed: int,
    exclude: Container[str] = (),
    lexicon: Lexicon = GENERIC,
    templates: Sequence[Template] = TEMPLATES,
) -> Iterator[Example]:
    """Endless requests; none whose `core` is in `exclude`."""
    rng = Random(seed)
    while True:
        drawn = example(rng, lexicon, templates)
        if drawn.core not in exclude:
            yield drawn


def generic_examples(
    seed: int, count: int, exclude: Container[str] = (), lexicon: Lexicon = GENERIC
) -> list[Example]:
    """`count` different requests; none whose `core` is in `exclude`."""
    found: dict[str, Example] = {}
    for drawn in stream(seed, exclude, lexicon):
        found.setdefault(drawn.core, drawn)
        if len(found) == count:
            break
    return list(found.values())
