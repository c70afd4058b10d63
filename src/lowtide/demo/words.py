"""Word lists of the demo's requests, and the made-up names that teach a model to copy.

A small model that sees only forty room names learns forty room names. It has to copy what it
was told instead, so most names in the pretraining data are drawn from far larger sets: nouns
used as nicknames, adjective and noun pairs, and pseudo-words built from syllables, which
practically never repeat.
"""

from __future__ import annotations

from random import Random


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


ROOMS = _split("""
kitchen, bedroom, living room, bathroom, hallway, office, garage, attic, basement, study, nursery,
dining room, guest room, laundry room, playroom, porch, patio, balcony, pantry, workshop, library,
conservatory, cellar, landing, utility room, entrance, lounge, den, shed, sunroom, gym, spare room,
kids room, family room, music room, greenhouse, terrace, loft, closet, stairs, front yard
""")

ADJECTIVES = _split("""
blue, red, green, big, small, old, new, upstairs, downstairs, front, back, upper, lower, north,
south, east, west, main, second, little, quiet, round, long, sunny, dark, cosy, yellow, white,
black, golden, inner, outer, middle, hidden, noisy, tiny, grand, silver, crooked, magic
""")

NOUNS = _split("""
cave, nest, hangar, lagoon, bridge, jungle, castle, burrow, harbour, cabin, tower, corner, nook,
island, bunker, palace, meadow, river, forest, volcano, station, cockpit, temple, arena, studio,
market, tunnel, garden, desert, glacier, stable, dungeon, orbit, capsule, chapel, theatre, academy,
oasis, pond, valley, summit, canyon, reef, dock, barn, mill, forge, vault, hive, den, lair, roost,
dragon, beast, tiger, whale, falcon, rocket, comet, wizard, giant, pirate, robot, monster, captain,
goblin, phoenix, turtle, badger, otter, rabbit, hamster, lion, panda, gecko, raven, sparrow, bear,
bertha, thunder, storm, breeze, sunrise, shadow, lantern, engine, wagon, saddle, anchor, compass,
marble, pepper, ginger, pickle, waffle, muffin, biscuit, noodle, dumpling, button, ribbon, bubble,
whistle, trumpet, drum, banjo, fiddle, puzzle, riddle, quest, mission, parade, circus, picnic
""")

DEVICES = _split("""
heater, fan, coffee maker, kettle, lamp, dishwasher, washing machine, dryer, humidifier, radio,
air purifier, toaster, printer, projector, tv, speaker, router, camera, doorbell, pump, sprinkler,
electric blanket, rice cooker, slow cooker, dehumidifier, freezer, sauna, jacuzzi, fireplace,
desk lamp, night light, fish tank, treadmill, mixer, charger, space heater, ceiling fan
""")

PEOPLE = _split("""
anna, ben, clara, david, ella, frank, grace, henry, iris, jack, kate, leo, mia, noah, olivia, paul,
quinn, rosa, sam, tess, uma, victor, wendy, xavier, yara, zoe, mum, dad, grandma, grandpa, theo,
lucas, nina, omar, petra, ravi, sofia, tariq, ingrid, mateo, aisha, bjorn, chen, diego, elena,
fatima, george, hana, ivan, june, karl, lena, marco, nadia, oscar, priya, robin, sanna, tom
""")

DOORS = _split("""
front door, back door, garage door, side gate, garden gate, patio door, cellar door, main door,
shed door, balcony door, kitchen door, office door, side door, gate, porch door
""")

ITEMS = _split("""
milk, bread, eggs, butter, rice, pasta, apples, bananas, oat milk, coffee beans, green tea, sugar,
flour, olive oil, tomatoes, onions, garlic, potatoes, carrots, cheese, yogurt, chicken, tofu, fish,
dish soap, toilet paper, paper towels, batteries, light bulbs, cat food, dog food, bird seed, honey,
orange juice, lemons, salt, black pepper, dark chocolate, crackers, cereal, peanut butter, jam,
frozen peas, spinach, mushrooms, red wine, sparkling water, shampoo, toothpaste, sponges, foil,
chewing gum, baking soda, cinnamon, walnuts, almonds, raisins, lentils, chickpeas, soy sauce
""")

LISTS = _split("""
shopping, grocery, packing, todo, wish, gift, hardware, party, camping, school, pharmacy, garden,
weekend, holiday, reading, chores, work
""")

MUSIC = _split("""
jazz, classical music, rock, the news, techno, folk songs, lullabies, piano music, blues, reggae,
disco, hip hop, the radio, country music, whale sounds, rain sounds, film music, opera, soul,
white noise, morning jazz, the beatles, an audiobook, a podcast, ambient music, salsa, swing
""")

SHOWS = _split("""
the news, cartoons, the football, a western, the weather channel, a cooking show, a quiz show,
nature films, a documentary, the cycling, a comedy, old films, the tennis, a thriller
""")

ZONES = _split("""
lawn, roses, tomatoes, hedge, front garden, back garden, vegetables, herbs, flower beds, orchard,
raised beds, strawberries, pots, window boxes, olive tree, fig tree, lavender, ferns
""")

PLACES = _split("""
oslo, paris, berlin, london, madrid, rome, lisbon, vienna, prague, dublin, helsinki, warsaw, athens,
tokyo, boston, chicago, denver, toronto, sydney, cairo, nairobi, lima, quito, delhi, seoul, osaka,
bergen, geneva, porto, seville, naples, lyon, ghent, malmo, turku, gdansk, krakow, bath, york, leeds
""")

COLORS = _split("red, blue, green, purple, orange, pink, warm white, cool white, yellow, turquoise")
DAYS = _split("monday, tuesday, wednesday, thursday, friday, saturday, sunday")
DAY_WORDS = ("today", "tomorrow", "tonight", *DAYS)

TASKS = _split("""
call {person}, email {person}, pick up {person}, pay the rent, take out the bins, buy {item},
water the {zone}, feed the {noun}, meet {person}, book the dentist, charge the {device},
clean the {device}, walk the dog, check the {device}, text {person}, bring {item}, do the laundry,
take my pills, renew the passport, return the library books, ask {person} about the {noun},
wrap the gift for {person}, move the car, cancel the {noun}, collect the {noun} from {person}
""")

MESSAGES = _split("""
dinner is ready, i am on my way, i will be late, the {noun} is here, we need {item}, come home,
the {device} is broken, bring {item}, good night, happy birthday, the keys are in the {noun},
call me back, i am in the {noun}, lunch is on the table, the train is late, {person} is here,
do not forget {item}, the {noun} is ready, see you soon, {person} called
""")

TIMER_NAMES = _split("""
pasta, pizza, egg, tea, bread, rice, laundry, nap, workout, cake, oven, cookies, chicken, break
""")

_ONSETS = _split("b, d, f, g, h, j, k, l, m, n, p, r, s, t, v, w, z, bl, st, tr, kr, gr, sh, fl")
_VOWELS = _split("a, e, i, o, u")
_CODAS = _split("n, r, l, m, s, t, x, nd, sh")
_RARE_ONSETS = _split("c, ch, cl, cr, dr, gl, pl, pr, qu, sk, sl, sm, sn, sp, str, th, y, br")
_RARE_VOWELS = _split("ai, ea, ee, oo, ou, y, oa")
_RARE_CODAS = _split("b, ck, d, f, g, ll, ng, nk, p, rk, rt, st, zz, th, rn, ster, ville, kin, ly")


def pseudo_word(rng: Random) -> str:
    """A pronounceable word of one to three syllables that nobody has seen before."""
    rare = 0.5 if rng.random() < 0.2 else 0.0
    parts = []
    for _ in range(rng.choice((1, 2, 2, 2, 2, 3))):
        parts.append(rng.choice(_RARE_ONSETS if rng.random() < rare else _ONSETS))
        parts.append(rng.choice(_RARE_VOWELS if rng.random() < rare else _VOWELS))
        if rng.random() < 0.3:
            parts.append(rng.choice(_RARE_CODAS if rng.random() < rare else _CODAS))
    return "".join(parts)
