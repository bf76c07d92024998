"""Infilling: text with holes becomes requests that see both sides of each hole.

Owns the requests, one per length of the holes, and the choice among their completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from unmask.data.tokenizer import Tokenizer
from unmask.engine.request import Completion, Request
from unmask.errors import RequestError


@dataclass(frozen=True)
class Infilling:
    """A filled text.

    Attributes:
        text: all of it.
        fills: what went into each hole.
        tokens_per_hole: the length of the chosen filling.
        score: mean log-probability of the filled tokens, in nats, each at the step that decided it.
        forwards: of all lengths tried.
    """

    text: str
    fills: tuple[str, ...]
    tokens_per_hole: int
    score: float
    forwards: int
    seconds: float


def split_holes(text: str, hole: str) -> list[str]:
    """The text around the holes, one part more than there are holes. A space before a hole goes to the hole.

    Raises:
        RequestError: no hole.
    """
    if not hole or hole not in text:
        raise RequestError(f"the text has no hole {hole!r}; write one where something is to be filled in")
    parts = text.split(hole)
    return [part.removesuffix(" ") for part in parts[:-1]] + parts[-1:]


def filling_requests(
    template: Request, parts: Sequence[str], tokens: int | tuple[int, int], tokenizer: Tokenizer, *, whole: bool
) -> list[Request]:
    """A request for every length tried.

    Args:
        template: decoding options; its ids and max_new_tokens are replaced.
        parts: the text around the holes.
        tokens: tokens of a hole, or the least and the most.
        tokenizer: no special token is ever filled in.
        whole: one block over everything.
    """
    least, most = (tokens, tokens) if isinstance(tokens, int) else tokens
    if not 1 <= least <= most:
        raise RequestError(f"tokens of a hole are {least} to {most}; they must be at least 1, the least first")
    banned = {token: float("-inf") for token in tokenizer.special_tokens.values()}
    around = [tokenizer.encode(part) for part in parts]
    requests = []
    for count in range(least, most + 1):
        ids: list[int | None] = [*tokenizer.prefix_ids, *around[0]]
        for part in around[1:]:
            ids += [*[None] * count, *part]
        params = template.params
        params = params.replace(max_new_tokens=0, logit_bias={**banned, **params.logit_bias}, logprobs=params.logprobs or 0)
        if whole:
            # A block as long as the text; the same number of commits a step at least as in blocks of the usual size.
            params = params.replace(block_size=len(ids), steps=min(params.steps, len(ids)))
        requests.append(replace(template, ids=tuple(ids), params=params))
    return requests


def best_filling(
    requests: Sequence[Request], completions: Sequence[Completion], tokenizer: Tokenizer, seconds: float
) -> Infilling:
    """The filling whose tokens are likeliest on average; the shortest on ties."""
    scores = []
    for completion in completions:
        assert completion.logprobs is not None, "filling requests ask for them"
        scores.append(sum(entry.logprob for entry in completion.logprobs) / len(completion.logprobs))
    best = max(range(len(scores)), key=lambda i: (scores[i], -i))
    request, filled = requests[best], iter(completions[best].ids)
    ids = [next(filled) if token is None else token for token in request.ids]
    by_origin = groupby(zip(request.ids, ids, strict=True), key=lambda pair: pair[0] is None)
    holes = [[token for _, token in pairs] for is_hole, pairs in by_origin if is_hole]
    num_prefix = len(tokenizer.prefix_ids)
    return Infilling(
        text=tokenizer.decode(ids[num_prefix:]),
        fills=tuple(tokenizer.decode(hole) for hole in holes),
        tokens_per_hole=len(holes[0]),
        score=scores[best],
        forwards=sum(completion.forwards for completion in completions),
        seconds=seconds,
    )
