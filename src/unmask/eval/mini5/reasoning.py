"""Deduction: questions about what follows from the few statements of the prompt.

Owns these questions: family relationships of reasoning-gym, and our own about order, categories, rules, elimination and
syllogisms (reasoning-gym 0.1.25 calls "All A are B, some B are not C, so some A are not C" valid).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

from unmask.eval.mini5.generator import Generator, Question, gym, seeded
from unmask.eval.mini5.knowledge import COLOURS, JOBS, PEOPLE, PETS, word

_FORM = "Explain in short steps, then end with 'Answer: <{}>'."
_ONE_WORD, _YES_OR_NO = _FORM.format("word"), _FORM.format("yes or no")
# For other relations (in-laws, nieces) reasoning-gym 0.1.25 names the second person's role, not the first's.
_RELATIONS = (
    *("father", "mother", "son", "daughter", "husband", "wife", "brother", "sister", "grandfather", "grandmother"),
    *("father-in-law", "mother-in-law", "son-in-law", "daughter-in-law", "grandson", "granddaughter"),
)
_RELATIONS_IN_QUESTIONS = _RELATIONS[:10]
_ORDERS = (("taller", "tallest", "shortest"), ("older", "oldest", "youngest"), ("faster", "fastest", "slowest"))
_STATES = (
    *("the bell rings", "the door opens", "the lamp glows", "the fan spins", "the dog barks", "the gate closes"),
    *("the pump starts", "the alarm sounds", "the screen flickers", "the heater stops", "the flag rises", "the bird sings"),
)
_KINDS = (
    *("robots", "poets", "dancers", "sailors", "lizards", "wizards", "pilots", "singers", "foxes", "bakers", "gamers"),
    *("nurses", "doctors", "hikers", "owls", "vampires", "scouts", "knights"),
)
_FORMS = ("All {} are {}.", "No {} are {}.", "Some {} are {}.", "Some {} are not {}.")


def _family_relationship(seed: int) -> Question | None:
    question, answer = gym("family_relationships", seed, min_family_size=4, max_family_size=6)
    if answer not in _RELATIONS_IN_QUESTIONS:
        return None
    # The gym's own instruction ("Respond only with the word ...") is replaced; it gives no steps, so the prompt asks for none.
    return Question(f"{question.rpartition('?')[0]}? End with the one word for it, 'Answer: <word>'.", word(answer, _RELATIONS))


def _listed(names: list[str], joined: str = "or") -> str:
    first, second, third = sorted(names)
    return f"{first}, {second} {joined} {third}"


def _order(rng: random.Random) -> Question:
    more, most, least = rng.choice(_ORDERS)
    people = rng.sample(PEOPLE, 3)
    facts = [f"{a} is {more} than {b}." for a, b in pairwise(people)]
    work = f"{' '.join(facts)} From {most} to {least}: {', '.join(people)}."
    rng.shuffle(facts)
    extreme, answer = rng.choice([(most, people[0]), (least, people[-1])])
    return Question(f"{' '.join(facts)} Who is the {extreme}: {_listed(people)}? {_ONE_WORD}", word(answer, people), work=work)


def _hats(rng: random.Random) -> Question:
    people, jobs, colours = rng.sample(PEOPLE, 3), rng.sample(JOBS, 3), rng.sample(COLOURS, 3)
    facts = [f"Every {job} has a hat that is {colour}." for job, colour in zip(jobs, colours, strict=True)]
    facts += [f"{name} is a {job}." for name, job in zip(people, jobs, strict=True)]
    rng.shuffle(facts)
    row = rng.randrange(3)
    work = f"{people[row]} is a {jobs[row]}. Every {jobs[row]} has a hat that is {colours[row]}."
    return Question(
        f"{' '.join(facts)} What colour is {people[row]}'s hat? {_ONE_WORD}", word(colours[row], colours), work=work
    )


def _rules(rng: random.Random) -> Question:
    chain = rng.sample(_STATES, 5)
    rules = {chain[0]: chain[1], chain[1]: chain[2], chain[3]: chain[4]}
    facts = [f"If {a}, then {b}." for a, b in rules.items()]
    rng.shuffle(facts)
    answer = rng.choice(("yes", "no"))
    start, end = rng.choice([(0, 2), (0, 1)] if answer == "yes" else [(0, 4), (3, 2), (2, 0)])
    question = f"We see that {chain[start]}. Does it follow that {chain[end]}? {_YES_OR_NO}"
    state, steps = chain[start], []
    while state != chain[end] and state in rules:
        steps.append(f"{state}, so {rules[state]}.")
        state = rules[state]
    if state != chain[end]:
        steps += [f"no rule says what follows if {state}.", f"it does not follow that {chain[end]}."]
    work = " ".join(each[0].upper() + each[1:] for each in steps)
    return Question(f"{' '.join(facts)} {question}", word(answer, ("yes", "no")), work=work)


def _elimination(rng: random.Random) -> Question:
    people, pets = rng.sample(PEOPLE, 3), rng.sample(PETS, 3)
    pairs = list(zip(people, pets, strict=True))
    rng.shuffle(pairs)
    known, other, last = pairs
    facts = [f"{known[0]} has the {known[1]}.", f"{other[0]} does not have the {last[1]}."]
    rng.shuffle(facts)
    owners = f"{people[0]}, {people[1]} and {people[2]}"
    facts = [f"{owners} have one pet each: a {_listed(pets, 'and a').replace(', ', ', a ')}.", *facts]
    question = f"{' '.join(facts)} Who has the {last[1]}: {_listed(people)}? {_ONE_WORD}"
    steps = (
        f"{known[0]} has the {known[1]}.",
        f"{other[0]} does not have the {last[1]}, so {other[0]} has the {other[1]}.",
        f"That leaves the {last[1]} for {last[0]}.",
    )
    return Question(question, word(last[0], people), work=" ".join(steps))


Statement = tuple[int, int, int]


def _regions(world: int) -> list[int]:
    return [region for region in range(8) if world >> region & 1]


def _true_in(world: int, statement: Statement) -> bool:
    """Whether a statement (form, subject, predicate) holds in a world, whose bit r says that region r has members."""
    form, subject, predicate = statement
    inside = [region for region in _regions(world) if region >> subject & 1]
    both = any(region >> predicate & 1 for region in inside)
    outside = any(not region >> predicate & 1 for region in inside)
    return (not outside, not both, both, outside)[form]


def _counterexamples(first: Statement, second: Statement, conclusion: Statement) -> list[int]:
    """The worlds in which two premises are true and a conclusion is false."""
    worlds = (world for world in range(256) if _true_in(world, first) and _true_in(world, second))
    return [world for world in worlds if not _true_in(world, conclusion)]


def _inhabited(world: int) -> bool:
    return all(any(region >> term & 1 for region in _regions(world)) for term in range(3))


@cache
def follows(first: Statement, second: Statement, conclusion: Statement) -> bool | None:
    """Whether two premises about terms 0, 1 and 2 entail a conclusion; None where they do only if every term has members."""
    counterexamples = _counterexamples(first, second, conclusion)
    return not counterexamples if bool(counterexamples) == any(map(_inhabited, counterexamples)) else None


def _derivation(first: Statement, second: Statement, conclusion: Statement, terms: Sequence[str]) -> str:
    """The proof of a valid conclusion through the middle term, or the smallest counterexample of an invalid one."""
    if follows(first, second, conclusion):
        # In all valid moods, the first premise says what members of term 0 are, and the second what follows from that.
        amount, (middle, last) = "some" if first[0] > 1 else "any", ("not " * (form % 2) for form in (first[0], conclusion[0]))
        return f"Take {amount} {terms[0]}: they are {middle}{terms[1]}, so they are {last}{terms[2]}."
    counterexamples = filter(_inhabited, _counterexamples(first, second, conclusion))
    smallest = min(counterexamples, key=lambda world: (world.bit_count(), world))
    kinds = (" and ".join(terms[each] for each in range(3) if region >> each & 1) for region in _regions(smallest))
    return f"It can be: {' '.join(f'some are only {kind};' for kind in kinds)} there are no others."


def _syllogism(rng: random.Random) -> Question:
    is_valid = rng.random() < 0.5
    while True:
        middle = rng.choice(((1, 2), (2, 1)))
        first, second, conclusion = (rng.randrange(4), 0, 1), (rng.randrange(4), *middle), (rng.randrange(4), 0, 2)
        if follows(first, second, conclusion) is is_valid:
            break
    terms = rng.sample(_KINDS, 3)
    premise, other, claim = (_FORMS[form].format(terms[a], terms[b]) for form, a, b in (first, second, conclusion))
    question = f"Does it follow that {claim[0].lower()}{claim[1:-1]}? {_YES_OR_NO}"
    work = _derivation(first, second, conclusion, terms)
    return Question(f"{premise} {other} {question}", word("yes" if is_valid else "no", ("yes", "no")), work=work)


GENERATORS = (
    Generator("family_relationships", _family_relationship),
    Generator("order", seeded(_order)),
    Generator("hats", seeded(_hats)),
    Generator("rules", seeded(_rules)),
    Generator("elimination", seeded(_elimination)),
    Generator("syllogism", seeded(_syllogism)),
)
