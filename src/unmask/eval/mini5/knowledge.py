"""Knowledge in context: the prompt states facts about made-up people and places and asks for one of them.

Owns these questions, and the names that other questions use. What a model knows of the world does not help. The target is one
word; the work quotes the fact that says so.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from unmask.eval.mini5.generator import Generator, Question, distinct, seeded

PEOPLE = (
    *("Anna", "Boris", "Clara", "David", "Emma", "Farid", "Grace", "Hugo", "Iris", "Jonas", "Karin", "Liam", "Mira", "Nadia"),
    *("Oscar", "Paula", "Ravi", "Sofia", "Tomas", "Uma", "Victor", "Wanda", "Yusuf", "Zoe", "Amir", "Bella", "Carlos", "Dina"),
)
JOBS = ("baker", "pilot", "nurse", "farmer", "painter", "teacher", "lawyer", "singer", "plumber", "tailor", "judge", "barber")
PETS = ("cat", "dog", "parrot", "rabbit", "hamster", "turtle", "goat", "pony", "snake", "duck", "ferret", "canary")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "orange", "purple", "brown", "pink", "grey", "gold")
THINGS = ("lamp", "coin", "letter", "drum", "mirror", "basket", "ring", "kettle", "flute", "carpet", "clock", "vase")
_ONSETS, _VOWELS, _ENDS = "bdfgklmnprtvz", "aeiou", ("ton", "by", "ford", "mar", "ville")
_FORM = "Quote what says so, then end with 'Answer: <word>'."


def place(rng: random.Random) -> str:
    """The name of a town that does not exist."""
    return (rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_ENDS)).title()


def places(rng: random.Random, count: int) -> list[str]:
    """Towns with different names."""
    return distinct(lambda: place(rng), count)


def word(answer: str, among: Sequence[str]) -> dict[str, object]:
    """A target: the word `answer`, and no other word of `among`."""
    return {"kind": "word", "answer": answer, "among": list(among)}


def _table(rng: random.Random) -> Question:
    people, towns = rng.sample(PEOPLE, 4), places(rng, 4)
    jobs, pets = rng.sample(JOBS, 4), rng.sample(PETS, 4)
    rows = "\n".join(" | ".join(row) for row in zip(people, jobs, pets, towns, strict=True))
    row = rng.randrange(4)
    question, column = rng.choice(
        [("What is {}'s job?", jobs), ("What pet does {} have?", pets), ("In which town does {} live?", towns)]
    )
    prompt = f"Name | Job | Pet | Town\n{rows}\n\n{question.format(people[row])} {_FORM}"
    return Question(prompt, word(column[row], column), work=f"{people[row]}: {jobs[row]}, {pets[row]}, {towns[row]}.")


def _note(rng: random.Random) -> Question:
    people, towns = rng.sample(PEOPLE, 3), places(rng, 3)
    jobs, pets = rng.sample(JOBS, 3), rng.sample(PETS, 3)
    facts = [
        f"{name} is a {job} from {town} and has a {pet}."
        for name, job, town, pet in zip(people, jobs, towns, pets, strict=True)
    ]
    row = rng.randrange(3)
    question, column = rng.choice(
        [("What is {}'s job?", jobs), ("Which pet does {} have?", pets), ("Which town is {} from?", towns)]
    )
    prompt = f"{' '.join(facts)}\n\n{question.format(people[row])} {_FORM}"
    return Question(prompt, word(column[row], column), work=facts[row])


def _reverse(rng: random.Random) -> Question:
    people, towns, things = rng.sample(PEOPLE, 4), places(rng, 4), rng.sample(THINGS, 4)
    facts = [f"{name} from {town} bought the {thing}." for name, town, thing in zip(people, towns, things, strict=True)]
    row = rng.randrange(4)
    question = rng.choice([f"Who bought the {things[row]}?", f"Who is from {towns[row]}?"])
    return Question(f"{' '.join(facts)}\n\n{question} {_FORM}", word(people[row], people), work=facts[row])


def _update(rng: random.Random) -> Question:
    (first, second), (old, new, other) = rng.sample(PEOPLE, 2), places(rng, 3)
    facts = [f"{first} lived in {old}.", f"{second} lived in {other}.", f"Then {first} moved from {old} to {new}."]
    if rng.random() < 0.5:
        facts[:2] = facts[1::-1]
    person = rng.choice([first, first, second])
    answer = new if person == first else other
    work = " ".join(fact for fact in facts if person in fact.split())
    return Question(f"{' '.join(facts)}\n\nWhere does {person} live now? {_FORM}", word(answer, (old, new, other)), work=work)


def _two_hops(rng: random.Random) -> Question:
    people, towns, colours = rng.sample(PEOPLE, 3), places(rng, 3), rng.sample(COLOURS, 3)
    thing = rng.choice(THINGS)
    owned = [f"{name} owns the {colour} {thing}." for name, colour in zip(people, colours, strict=True)]
    lived = [f"{name} lives in {town}." for name, town in zip(people, towns, strict=True)]
    rng.shuffle(owned)
    rng.shuffle(lived)
    row = rng.randrange(3)
    question = f"In which town does the owner of the {colours[row]} {thing} live?"
    work = f"{people[row]} owns the {colours[row]} {thing}. {people[row]} lives in {towns[row]}."
    return Question(f"{' '.join([*owned, *lived])}\n\n{question} {_FORM}", word(towns[row], towns), work=work)


GENERATORS = tuple(
    Generator(name, seeded(make))
    for name, make in (("table", _table), ("note", _note), ("reverse", _reverse), ("update", _update), ("two_hops", _two_hops))
)
