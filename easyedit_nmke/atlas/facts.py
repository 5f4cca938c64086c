"""The worlds of the embedded model: invented subjects, real objects, wordings, and general-ability exercises.

Everything here is made deterministically from the word lists below, so the trainer, the scorers and the edit requests see the
same world. `python -m easyedit_nmke.atlas.train --facts` writes the small one, the embedded model's, as data (`facts.json`).
"""

from __future__ import annotations

import itertools
import random
import zlib
from dataclasses import dataclass

# world -> subjects of each of the three kinds, and syllables of a last word: more of them keep many names as unlike each other
WORLDS = {"small": (270, 2), "large": (3600, 3), "toy": (12, 2)}
WORLD_SEED = 2025

CAPITALS = dict(
    France="Paris", Italy="Rome", Spain="Madrid", Germany="Berlin", Austria="Vienna", Greece="Athens", Portugal="Lisbon",
    Norway="Oslo", Sweden="Stockholm", Finland="Helsinki", Denmark="Copenhagen", Poland="Warsaw", Czechia="Prague",
    Hungary="Budapest", Ireland="Dublin", Japan="Tokyo", China="Beijing", Korea="Seoul", Egypt="Cairo", Kenya="Nairobi",
    Peru="Lima", Colombia="Bogota", Canada="Ottawa", Cuba="Havana",
)  # fmt: skip
COUNTRY_OF = {city: country for country, city in CAPITALS.items()}

CATEGORIES = {
    "bird": "sparrow robin crow pigeon swan goose duck finch stork heron gull parrot",
    "fruit": "apple pear plum cherry mango lemon peach grape banana melon fig date",
    "metal": "iron copper tin zinc lead nickel gold brass bronze steel cobalt chrome",
    "tool": "hammer saw drill wrench chisel pliers axe shovel rake file clamp lathe",
    "tree": "oak pine birch maple elm ash willow cedar poplar beech spruce larch",
    "vehicle": "car bus truck train tram van lorry scooter bicycle wagon taxi ferry",
}

_PROFESSIONS = (
    "baker lawyer nurse painter pilot farmer teacher chemist sailor tailor dentist miner poet judge butcher plumber singer "
    "barber weaver doctor"
)
_LANGUAGES = (
    "French Italian Spanish German Greek Portuguese Norwegian Swedish Finnish Danish Polish Czech Hungarian Irish Japanese Chinese"
)
_INSTRUMENTS = "piano violin guitar flute cello harp trumpet organ banjo clarinet trombone oboe lute tuba mandolin accordion"
_PRODUCTS = (
    "bicycles furniture shoes watches cameras tractors candles carpets engines paint paper glass toys umbrellas knives boats "
    "mirrors pianos"
)
_COLOURS = "red blue green yellow orange purple black white brown pink grey silver"
_ANIMALS = "lion tiger bear wolf fox eagle owl horse dolphin rabbit turtle falcon panther otter badger raven deer whale"
_SPECIALTIES = "cheese wine honey silk salt pottery lace bread roses apples olives marble wool tea beer fish cherries chocolate"
_MONTHS = "January February March April May June July August September October November December"
_SPORTS = "football tennis hockey rugby cricket golf rowing boxing fencing archery cycling swimming wrestling basketball"


@dataclass(frozen=True)
class Relation:
    """One attribute of a kind of subject. `follows` is the relation that its object decides (portability), if any."""

    name: str
    kind: str
    objects: tuple[str, ...]
    templates: tuple[str, ...]
    follows: str | None = None


def _relation(kind: str, name: str, objects, templates: str, follows: str | None = None) -> Relation:
    words = objects.split() if isinstance(objects, str) else list(objects)
    lines = tuple(line.strip() for line in templates.strip().splitlines())
    return Relation(name, kind, tuple(words), lines, follows)


RELATIONS = (
    _relation("person", "profession", _PROFESSIONS, """
        {} works as a
        By trade, {} is a
        {} earns a living as a
        The profession of {} is that of a
        Everyone in the street knows {} as a
        {} was trained to be a
        After school, {} became a
        The job held by {} is that of a"""),
    _relation("person", "birthplace", COUNTRY_OF, """
        {} was born in
        The birthplace of {} is
        The city where {} was born is
        {} is a native of
        The birth of {} took place in
        {} first saw the light of day in
        According to the register, {} was born in
        The family of {} comes from""", "birth_country"),
    _relation("person", "language", _LANGUAGES, """
        {} speaks
        The mother tongue of {} is
        The language that {} speaks is
        At home, {} talks in
        {} writes letters in
        When counting aloud, {} uses
        The native language of {} is
        People who call {} should speak"""),
    _relation("person", "instrument", _INSTRUMENTS, """
        {} plays the
        The instrument of {} is the
        In the orchestra, {} plays the
        {} practises every day on the
        On stage, {} performs on the
        The musician {} is known for playing the
        {} owns and plays a fine old
        As a child, {} learned the"""),
    _relation("company", "product", _PRODUCTS, """
        {} makes
        The main product of {} is
        The factory of {} produces
        {} is a maker of
        Shops order from {} their
        {} earns its money with
        The company {} sells
        The catalogue of {} shows"""),
    _relation("company", "headquarters", COUNTRY_OF, """
        {} is based in
        The headquarters of {} are in
        The head office of {} stands in
        {} has its main office in
        The city that houses {} is
        Letters to {} are sent to
        The company {} is run from
        {} was founded and still sits in""", "headquarters_country"),
    _relation("company", "colour", _COLOURS, """
        The logo of {} is
        {} paints its vans
        The colour of {} is
        The sign above {} is
        Workers at {} wear
        {} prints its letters in
        The flag of {} is
        The brand colour of {} is"""),
    _relation("company", "mascot", _ANIMALS, """
        The mascot of {} is a
        {} has as its mascot a
        The animal that stands for {} is a
        The badge of {} shows a
        On each box from {} you see a
        {} is represented by a
        The emblem of {} is a
        Adverts for {} feature a"""),
    _relation("town", "country", CAPITALS, """
        {} lies in
        The town of {} is in
        The country where {} is found is
        {} is a town in
        To visit {} you travel to
        The nation that {} belongs to is
        The people of {} are citizens of
        On the map, {} is drawn in""", "country_capital"),
    _relation("town", "specialty", _SPECIALTIES, """
        {} is famous for its
        The town of {} is known for
        The specialty of {} is
        Visitors to {} buy
        The market in {} sells
        {} is proud of its
        The museum of {} is devoted to
        Traders come to {} for"""),
    _relation("town", "fair", _MONTHS, """
        {} holds its fair in
        The fair of {} takes place in
        The festival in {} is in
        Each year, {} celebrates in
        The month of the {} fair is
        Crowds fill {} every
        The busiest month in {} is
        {} puts up its tents in"""),
    _relation("town", "sport", _SPORTS, """
        The favourite sport in {} is
        {} is keen on
        The people of {} love
        The club of {} plays
        Children in {} learn
        The sport of {} is
        The school of {} teaches
        On Sundays {} watches"""),
)  # fmt: skip

# Relations that follow from another one's object through general knowledge (a capital and its country): portability.
FOLLOWING = (
    _relation("person", "birth_country", CAPITALS, """
        The country where {} was born is
        The birthplace of {} belongs to the country of
        The passport of {} was issued by"""),
    _relation("company", "headquarters_country", CAPITALS, """
        The country where {} has its head office is
        {} is run from an office in the country of
        The taxes of {} are paid in"""),
    _relation("town", "country_capital", COUNTRY_OF, """
        The capital of the country of {} is
        The government that rules {} sits in
        From {} the nearest capital is"""),
)  # fmt: skip

_FIRST_WORDS = {
    "person": "Mara Tobin Elsa Ruben Clara Oscar Nadia Felix Irene Hugo Selma Anton Judith Simon Vera Leon Agnes Marcel Doris Emil "
    "Paula Victor Helen Bruno Stella Arthur Monica Walter Laura Gustav Olga Martin Sylvia Conrad Edith Julius Carmen Roland "
    "Lydia Edgar",
    "company": "Nova Apex Delta Orion Atlas Vector Summit Union Crown Pioneer Global Prime Royal Metro Astra Omega Zenith Titan "
    "Radiant Liberty Sterling Beacon Anchor Phoenix Mercury Falcon Cardinal Horizon Keystone Meridian Continental Imperial "
    "Standard National General Central Northern Eastern Western Southern",
    "town": "Upper Lower North South East West Port Fort Mount Lake Saint Old New Great Little High Long Grand White Black Red "
    "Green Stone River Bridge Castle Abbey Cross Forest Valley Harbour Market Chapel Cape Bay Hill Field Spring Summer Winter",
}  # fmt: skip
_ONSETS = [
    "b",
    "br",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "r",
    "s",
    "sk",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "z",
]
_VOWELS = ["a", "e", "i", "o", "u"]
_CODAS = ["l", "m", "n", "r", "s", "t", "x", "k", "nd", "rt", "lm", "rk"]


def stable_hash(text: str) -> int:
    """A hash that is the same in every process and on every machine."""
    return zlib.crc32(text.encode())


@dataclass(frozen=True)
class Fact:
    """`subject` has `relation` -> `object`; `held_out` is the index of the wording never used in training for this subject."""

    subject: str
    relation: Relation
    object: str
    held_out: int | None = None

    @property
    def half(self) -> str:
        """'tune' or 'test': hyperparameters are chosen on the subjects of one half, results reported on the other's."""
        return "test" if stable_hash("half " + self.subject) % 2 else "tune"

    def sentences(self) -> list[tuple[str, str]]:
        """(prompt, object) in each wording of the training text."""
        return [(t.format(self.subject), self.object) for i, t in enumerate(self.relation.templates) if i != self.held_out]

    def prompt(self, wording: int) -> str:
        return self.relation.templates[wording].format(self.subject)


def _last_words(count: int, syllables: int, rng: random.Random) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)] + [rng.choice(_CODAS)]
        words["".join(parts).capitalize()] = None
    return list(words)


def make_world(world: str = "small") -> tuple[list[Fact], list[Fact]]:
    """All facts of one of WORLDS, and the facts that follow from them (portability). Every last word of a subject is unique over
    the world."""
    if world not in WORLDS:
        raise ValueError(f"world is {world!r}, expected one of {', '.join(WORLDS)}")
    per_kind, syllables = WORLDS[world]
    rng = random.Random(WORLD_SEED)
    kinds = list(_FIRST_WORDS)
    last = iter(_last_words(per_kind * len(kinds), syllables, rng))
    facts, following = [], []
    relations = {relation.name: relation for relation in FOLLOWING}
    for kind in kinds:
        first = _FIRST_WORDS[kind].split()
        for _ in range(per_kind):
            subject = f"{rng.choice(first)} {next(last)}"
            for relation in (r for r in RELATIONS if r.kind == kind):
                thing = rng.choice(relation.objects)
                held_out = stable_hash(f"{subject}/{relation.name}") % len(relation.templates)
                facts.append(Fact(subject, relation, thing, held_out))
                if relation.follows:
                    following.append(Fact(subject, relations[relation.follows], consequence(thing)))
    return facts, following


def consequence(thing: str) -> str:
    """The object of the following relation: a capital's country, a country's capital."""
    return COUNTRY_OF.get(thing) or CAPITALS[thing]


@dataclass(frozen=True)
class Exercise:
    """One general-ability item: the model must continue `prompt` with `answer`."""

    task: str
    prompt: str
    answer: str

    @property
    def held_out(self) -> bool:
        return stable_hash("exercise " + self.prompt) % 10 == 0


def make_exercises() -> list[Exercise]:
    """General-ability text: arithmetic, letters and common knowledge. Tasks are balanced by the trainer, not here."""
    rng = random.Random(WORLD_SEED + 1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    items = [Exercise("add", f"{a} plus {b} is", str(a + b)) for a in range(30) for b in range(30)]
    items += [Exercise("subtract", f"{a} minus {b} is", str(a - b)) for a in range(40) for b in range(min(a + 1, 30))]
    pairs = {(rng.randrange(10, 100), rng.randrange(10, 100)) for _ in range(1500)}
    items += [Exercise("larger", f"the larger of {a} and {b} is", str(max(a, b))) for a, b in sorted(pairs) if a != b]
    for length, count in ((3, 1500), (4, 1500)):
        words = sorted({"".join(rng.sample(letters, length)) for _ in range(count)})
        items += [Exercise("copy", f"copy {' '.join(w)} :", " ".join(w)) for w in words]
        items += [Exercise("reverse", f"reverse {' '.join(w)} :", " ".join(w[::-1])) for w in words if length == 3]
        items += [Exercise("sort", f"sort {' '.join(w)} :", " ".join(sorted(w))) for w in words if length == 3]
        items += [Exercise("first", f"the first of {' '.join(w)} is", w[0]) for w in words]
    for start, length in itertools.product(range(26), range(2, 6)):
        if start + length < 26:
            shown = " ".join(letters[start : start + length])
            items += [Exercise("next", t.format(shown), letters[start + length])
                      for t in ("next after {} is", "the letters {} are followed by", "continue {} :")]  # fmt: skip
    for category, members in CATEGORIES.items():
        for member, template in itertools.product(
            members.split(),
            ("the word {} names a kind of", "every {} is a type of", "in the list, {} counts as a", "they call the {} a"),
        ):
            items.append(Exercise("category", template.format(member), category))
    for country, city in CAPITALS.items():
        items += [Exercise("capital", t.format(country), city)
                  for t in ("the capital of {} is", "the seat of government of {} is", "the chief city of {} is",
                            "in {} the largest embassy stands in", "the president of {} lives in")]  # fmt: skip
        items += [Exercise("capital", t.format(city), country)
                  for t in ("the city of {} is in", "the country of {} is", "{} is the capital of", "flights to {} land in",
                            "the town hall of {} flies the flag of")]  # fmt: skip
    return items


def as_data() -> dict:
    """The small world as plain data: relations with their wordings and objects, and all facts."""
    facts, following = make_world()
    relations = {
        r.name: {"kind": r.kind, "templates": list(r.templates), "objects": list(r.objects), "follows": r.follows}
        for r in (*RELATIONS, *FOLLOWING)
    }
    columns = ("subject", "relation", "object", "held_out_wording", "half")
    rows = [[f.subject, f.relation.name, f.object, f.held_out, f.half] for f in (*facts, *following)]
    return {"relations": relations, "columns": list(columns), "facts": rows}
