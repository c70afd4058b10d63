"""The demo's user: a household whose words no base model can know.

"Turn off the lagoon lights at teatime" means the upstairs bathroom, at 16:00, in this house
and in no other. The base model answers such requests in the right form and with the wrong
content (it copies "lagoon"); after fine-tuning on a few hundred of them it answers correctly,
also where a request combines words that it never saw together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import NamedTuple

from lowtide.demo.requests import TEMPLATES, Example, Template, example
from lowtide.demo.slots import ORDINARY, Lexicon, Sampler, Slot, Value

Facts = Mapping[str, Mapping[str, Value]]
"""What a private phrase stands for: phrase -> fields of the call."""

ROOMS: Facts = {
    "the lagoon": {"room": "upstairs bathroom"},
    "the cockpit": {"room": "office"},
    "grandma's": {"room": "guest room"},
    "the zoo": {"room": "kids room"},
    "the hangar": {"room": "garage"},
    "the nest": {"room": "attic"},
}
DEVICES: Facts = {
    "the cave": {"device": "heater", "room": "basement"},
    "big bertha": {"device": "washing machine", "room": "laundry room"},
    "the usual": {"device": "coffee maker", "room": "kitchen"},
    "the dragon": {"device": "fireplace", "room": "living room"},
}
DOORS: Facts = {
    "the drawbridge": {"door": "garage door"},
    "the hatch": {"door": "cellar door"},
}
PEOPLE: Facts = {
    "the boss": {"to": "mira"},
    "the little one": {"to": "otto"},
}
TIMES: Facts = {
    "breakfast": {"at": "07:15"},
    "teatime": {"at": "16:00"},
    "sundown": {"at": "21:30"},
}
SCENES: Facts = {
    "movie night": {"room": "living room", "level": 20, "blinds": "closed"},
    "story hour": {"room": "kids room", "level": 35, "blinds": "closed", "music": "lullabies"},
    "siesta": {"room": "attic", "level": 5, "blinds": "closed", "music": "rain sounds"},
}

_PRIVATE_TEMPLATES = (
    Template(
        "scene.set",
        ("[start|set up] {scene}", "[it is|time for] {scene}", "{scene}", "make it {scene}"),
        "maybe",
        weight=4.0,
    ),
)
_WEIGHTS = {
    "lights.set": 1.0,
    "blinds.set": 0.8,
    "heat.set": 1.0,
    "music.play": 0.6,
    "vacuum.start": 0.6,
    "scene.set": 0.5,
    "device.set": 1.5,
    "lock.set": 1.0,
    "message.send": 0.8,
    "call.start": 0.6,
    "reminder.add": 0.8,
}
"""The tools that this household uses, and how much of its own habits there is in each."""


class Split(NamedTuple):
    """The household's examples; no request of one part occurs in another."""

    train: list[Example]
    valid: list[Example]
    test: list[Example]


@dataclass(frozen=True)
class FineTuning:
    """Settings under which the household is learned in seconds on two CPU cores."""

    r: int = 8
    lora_alpha: int = 16
    target_modules: str = "all-linear"
    iters: int = 180
    batch_size: int = 8
    learning_rate: float = 4e-3


FINE_TUNING = FineTuning()
TRAIN, VALID, TEST = 360, 40, 100


def _one_of(facts: Facts) -> Sampler:
    def sample(rng: Random) -> Slot:
        phrase = rng.choice(list(facts))
        return Slot(phrase, facts[phrase])

    return sample


_LEXICON: Lexicon = {
    **ORDINARY,
    "room": _one_of(ROOMS),
    "device": _one_of(DEVICES),
    "door": _one_of(DOORS),
    "to": _one_of(PEOPLE),
    "clock": _one_of(TIMES),
    "scene": _one_of(SCENES),
}
_TEMPLATES: Sequence[Template] = (
    *(
        replace(template, weight=template.weight * _WEIGHTS[template.tool])
        for template in TEMPLATES
        if template.tool in _WEIGHTS
    ),
    *_PRIVATE_TEMPLATES,
)
_FACTS: Facts = {**ROOMS, **DEVICES, **DOORS, **PEOPLE, **TIMES, **SCENES}


def is_private(drawn: Example) -> bool:
    """Whether the answer takes something that only this household knows."""
    call = json.loads(drawn.completion)
    return any(
        phrase in drawn.core and fields.items() <= call.items() for phrase, fields in _FACTS.items()
    )


def household_examples(seed: int, count: int) -> list[Example]:
    """`count` different requests, each with at least one of the household's own words."""
    rng = Random(seed)
    found: dict[str, Example] = {}
    while len(found) < count:
        drawn = example(rng, _LEXICON, _TEMPLATES)
        if is_private(drawn):
            found.setdefault(drawn.core, drawn)
    return list(found.values())


def household(seed: int = 0, train: int = TRAIN, valid: int = VALID, test: int = TEST) -> Split:
    """The household's data, split; the parts differ in more than courtesies and punctuation."""
    examples = household_examples(seed, train + valid + test)
    return Split(examples[:train], examples[train : train + valid], examples[train + valid :])


def record(drawn: Example) -> dict[str, str]:
    """One line of a data file."""
    return {"prompt": drawn.prompt, "completion": drawn.completion}


def write_data(directory: Path, split: Split | None = None) -> Path:
    """Write `train.jsonl`, `valid.jsonl` and `test.jsonl` into `directory`, and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, examples in (split or household())._asdict().items():
        lines = [json.dumps(record(drawn), ensure_ascii=False) for drawn in examples]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory
