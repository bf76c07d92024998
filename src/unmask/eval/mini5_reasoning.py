"""Deduction: what follows from the few statements of the prompt.

Owns these questions: family relationships of reasoning-gym, and our own of order, categories, rules, elimination and
syllogisms (reasoning-gym 0.1.25 calls "All A are B, some B are not C, so some A are not C" valid).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

from unmask.eval.mini5_families import Draw, Family, gym, seeded
from unmask.eval.mini5_knowledge import COLOURS, JOBS, PEOPLE, PETS, word

_FORM = "Explain in short steps, then end with 'Answer: <{}>'."
_ONE_WORD, _YES_OR_NO = _FORM.format("word"), _FORM.format("yes or no")
# Where reasoning-gym 0.1.25 names others (in-laws, nieces), it names the second person's part, not the first's.
_RELATIONS = (
    *("father", "mother", "son", "daughter", "husband", "wife", "brother", "sister", "grandfather", "grandmother"),
    *("father-in-law", "mother-in-law", "son-in-law", "daughter-in-law", "grandson", "granddaughter"),
)
_ASKED_RELATIONS = _RELATIONS[:10]
_ORDERS = (("taller", "tallest", "shortest"), ("older", "oldest", "youngest"), ("faster", "fastest", "slowest"))
_STATES = (
    *("the bell rings", "the door opens", "the lamp glows", "the fan spins", "the dog barks", "the gate closes"),
    *("the pump starts", "the alarm sounds", "the screen flickers", "the heater stops", "the flag rises", "the bird sings"),
)
_KINDS = (
    *(
        "robots",
        "poets",
        "dancers",
        "sailors",
        "lizards",
        "wizards",
        "pilots",
        "singers",
        "foxes",
        "bakers",
        "gamers",
        "nurses",
    ),
    *("doctors", "hikers", "owls", "vampires", "scouts", "knights"),
)
_FORMS = ("All {} are {}.", "No {} are {}.", "Some {} are {}.", "Some {} are not {}.")


def _family(seed: int) -> Draw | None:
    question, answer = gym("family_relationships", seed, min_family_size=4, max_family_size=6)
    if answer not in _ASKED_RELATIONS:
        return None
    # The gym's own form ("Respond only with the word ...") goes; it gives no steps, so none are asked for.
    return Draw(f"{question.rpartition('?')[0]}? End with the one word for it, 'Answer: <word>'.", word(answer, _RELATIONS))


def _listed(names: list[str], joined: str = "or") -> str:
    first, second, third = sorted(names)
    return f"{first}, {second} {joined} {third}"


def _order(rng: random.Random) -> Draw:
    more, most, least = rng.choice(_ORDERS)
    people = rng.sample(PEOPLE, 3)
    told = [f"{a} is {more} than {b}." for a, b in pairwise(people)]
    work = f"{' '.join(told)} From {most} to {least}: {', '.join(people)}."
    rng.shuffle(told)
    asked, answer = rng.choice([(most, people[0]), (least, people[-1])])
    return Draw(f"{' '.join(told)} Who is the {asked}: {_listed(people)}? {_ONE_WORD}", word(answer, people), work=work)


def _hats(rng: random.Random) -> Draw:
    people, jobs, colours = rng.sample(PEOPLE, 3), rng.sample(JOBS, 3), rng.sample(COLOURS, 3)
    told = [f"Every {job} has a hat that is {colour}." for job, colour in zip(jobs, colours, strict=True)]
    told += [f"{name} is a {job}." for name, job in zip(people, jobs, strict=True)]
    rng.shuffle(told)
    row = rng.randrange(3)
    work = f"{people[row]} is a {jobs[row]}. Every {jobs[row]} has a hat that is {colours[row]}."
    return Draw(f"{' '.join(told)} What colour is {people[row]}'s hat? {_ONE_WORD}", word(colours[row], colours), work=work)


def _rules(rng: random.Random) -> Draw:
    chain = rng.sample(_STATES, 5)
    rules = {chain[0]: chain[1], chain[1]: chain[2], chain[3]: chain[4]}
    told = [f"If {a}, then {b}." for a, b in rules.items()]
    rng.shuffle(told)
    answer = rng.choice(("yes", "no"))
    start, end = rng.choice([(0, 2), (0, 1)] if answer == "yes" else [(0, 4), (3, 2), (2, 0)])
    asked = f"We see that {chain[start]}. Does it follow that {chain[end]}? {_YES_OR_NO}"
    state, steps = chain[start], []
    while state != chain[end] and state in rules:
        steps.append(f"{state}, so {rules[state]}.")
        state = rules[state]
    if state != chain[end]:
        steps += [f"no rule says what follows if {state}.", f"it does not follow that {chain[end]}."]
    work = " ".join(each[0].upper() + each[1:] for each in steps)
    return Draw(f"{' '.join(told)} {asked}", word(answer, ("yes", "no")), work=work)


def _elimination(rng: random.Random) -> Draw:
    people, pets = rng.sample(PEOPLE, 3), rng.sample(PETS, 3)
    pairs = list(zip(people, pets, strict=True))
    rng.shuffle(pairs)
    known, other, asked = pairs
    told = [f"{known[0]} has the {known[1]}.", f"{other[0]} does not have the {asked[1]}."]
    rng.shuffle(told)
    owners = f"{people[0]}, {people[1]} and {people[2]}"
    told = [f"{owners} have one pet each: a {_listed(pets, 'and a').replace(', ', ', a ')}.", *told]
    question = f"{' '.join(told)} Who has the {asked[1]}: {_listed(people)}? {_ONE_WORD}"
    steps = (
        f"{known[0]} has the {known[1]}.",
        f"{other[0]} does not have the {asked[1]}, so {other[0]} has the {other[1]}.",
        f"That leaves the {asked[1]} for {asked[0]}.",
    )
    return Draw(question, word(asked[0], people), work=" ".join(steps))


Statement = tuple[int, int, int]


def _regions(world: int) -> list[int]:
    return [region for region in range(8) if world >> region & 1]


def _true_in(world: int, statement: Statement) -> bool:
    """Whether a statement (form, subject, predicate) holds where bit r says that region r of the diagram is inhabited."""
    form, subject, predicate = statement
    inside = [region for region in _regions(world) if region >> subject & 1]
    both = any(region >> predicate & 1 for region in inside)
    outside = any(not region >> predicate & 1 for region in inside)
    return (not outside, not both, both, outside)[form]


def _counterexamples(first: Statement, second: Statement, conclusion: Statement) -> list[int]:
    """The worlds in which two premises are true and a conclusion is not."""
    worlds = (world for world in range(256) if _true_in(world, first) and _true_in(world, second))
    return [world for world in worlds if not _true_in(world, conclusion)]


def _inhabited(world: int) -> bool:
    return all(any(region >> term & 1 for region in _regions(world)) for term in range(3))


@cache
def follows(first: Statement, second: Statement, conclusion: Statement) -> bool | None:
    """Whether two premises about terms 0, 1 and 2 entail a conclusion; None: only if every term has members."""
    against = _counterexamples(first, second, conclusion)
    return not against if bool(against) == any(map(_inhabited, against)) else None


def _derivation(first: Statement, second: Statement, conclusion: Statement, terms: Sequence[str]) -> str:
    """A valid conclusion, by way of the middle term; else the smallest case that speaks against it."""
    if follows(first, second, conclusion):
        # In all valid moods, the first premise says what members of term 0 are, and the second what follows from that.
        amount, (middle, last) = "some" if first[0] > 1 else "any", ("not " * (form % 2) for form in (first[0], conclusion[0]))
        return f"Take {amount} {terms[0]}: they are {middle}{terms[1]}, so they are {last}{terms[2]}."
    against = filter(_inhabited, _counterexamples(first, second, conclusion))
    smallest = min(against, key=lambda world: (world.bit_count(), world))
    kinds = (" and ".join(terms[each] for each in range(3) if region >> each & 1) for region in _regions(smallest))
    return f"It can be: {' '.join(f'some are only {kind};' for kind in kinds)} there are no others."


def _syllogism(rng: random.Random) -> Draw:
    wanted = rng.random() < 0.5
    while True:
        middle = rng.choice(((1, 2), (2, 1)))
        first, second, conclusion = (rng.randrange(4), 0, 1), (rng.randrange(4), *middle), (rng.randrange(4), 0, 2)
        if follows(first, second, conclusion) is wanted:
            break
    terms = rng.sample(_KINDS, 3)
    told, other, claim = (_FORMS[form].format(terms[a], terms[b]) for form, a, b in (first, second, conclusion))
    asked = f"Does it follow that {claim[0].lower()}{claim[1:-1]}? {_YES_OR_NO}"
    work = _derivation(first, second, conclusion, terms)
    return Draw(f"{told} {other} {asked}", word("yes" if wanted else "no", ("yes", "no")), work=work)


FAMILIES = (
    Family("family_relationships", _family),
    Family("order", seeded(_order)),
    Family("hats", seeded(_hats)),
    Family("rules", seeded(_rules)),
    Family("elimination", seeded(_elimination)),
    Family("syllogism", seeded(_syllogism)),
)
