"""Infilling: text with holes becomes requests that see both sides of each hole.

Owns the requests, one per length of the holes, and the choice among their completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from unmask.data.tokenizer import Tokenizer
from unmask.engine.request import Completion, Request, decoding_seconds
from unmask.errors import RequestError

MAX_SPAN = 512
"""Tokens of a block that holds a hole and what follows it."""


@dataclass(frozen=True)
class Infilling:
    """A filled text.

    Attributes:
        text: all of it.
        fills: what went into each hole.
        tokens_per_hole: the length of the chosen filling.
        score: mean log-probability of the filled tokens, in nats, each at the step that decided it.
        forwards: of all lengths tried.
        seconds: of decoding them.
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

    Raises:
        RequestError: no such lengths, or stop strings, at which a hole would be left half filled.
    """
    if template.params.stop:
        raise RequestError(f"stop is {list(template.params.stop)!r}; holes are filled to their end: leave it out")
    least, most = (tokens, tokens) if isinstance(tokens, int) else tokens
    if not 1 <= least <= most:
        raise RequestError(f"tokens of a hole are {least} to {most}; they must be at least 1, the least first")
    around = [tokenizer.encode(part, after=[None] * index) for index, part in enumerate(parts)]
    requests = []
    for count in range(least, most + 1):
        ids: list[int | None] = [*tokenizer.prefix_ids, *around[0]]
        for part in around[1:]:
            ids += [*[None] * count, *part]
        request = _filling(template, ids, tokenizer, block_size=len(ids) if whole else None)
        requests.append(replace(request, params=request.params.replace(logprobs=request.params.logprobs or 0)))
    return requests


def fill_between(
    template: Request, before: Sequence[int], tokens: int, after: Sequence[int], tokenizer: Tokenizer, context: int
) -> Request:
    """A request for the text between two others: one hole, in a block that holds what follows it as well.

    A text of more than `MAX_SPAN` tokens loses what does not fit: the end of `after`, so that a quarter of the block stands
    before the hole, and the beginning of `before`, so that the rest is whole blocks.

    Args:
        template: decoding options; its ids, max_new_tokens and block_size are replaced.
        before: ids of the text before the hole, without prefix tokens.
        tokens: of the hole, all of which are filled.
        after: ids of the text after it.
        tokenizer: has the prefix tokens; no special token is ever filled in.
        context: most tokens that the model takes.

    Raises:
        RequestError: a hole longer than half a block, or than the context.
    """
    span, first = min(MAX_SPAN, context), list(tokenizer.prefix_ids)
    if not 1 <= tokens <= span // 2:
        raise RequestError(f"max_tokens is {tokens}; a hole before a suffix has 1 to {span // 2} tokens")
    after = after[: span * 3 // 4 - tokens]
    length = len(first) + len(before) + tokens + len(after)
    if length > span:
        before = before[length - min(length, context) // span * span :]
    ids: list[int | None] = [*first, *before, *[None] * tokens, *after]
    return _filling(template, ids, tokenizer, block_size=min(len(ids), span))


def _filling(template: Request, ids: Sequence[int | None], tokenizer: Tokenizer, *, block_size: int | None) -> Request:
    """A request to fill the holes of `ids`: in blocks of this size, of which a step commits as much as of usual ones."""
    banned = {token: float("-inf") for token in tokenizer.special_tokens.values()}
    params = template.params
    params = params.replace(max_new_tokens=0, logit_bias={**banned, **params.logit_bias})
    if block_size is not None:
        params = params.replace(block_size=block_size, steps=max(1, block_size * params.steps // params.block_size))
    return replace(template, ids=tuple(ids), params=params)


def best_filling(requests: Sequence[Request], completions: Sequence[Completion], tokenizer: Tokenizer) -> Infilling:
    """The filling whose tokens are likeliest on average; the shortest on ties."""
    scores = []
    for completion in completions:
        assert completion.logprobs is not None, "filling requests ask for them"
        scores.append(sum(entry.logprob for entry in completion.logprobs) / len(completion.logprobs))
    best = max(range(len(scores)), key=lambda i: (scores[i], -i))
    request, filled = requests[best], iter(completions[best].ids)
    ids = [next(filled) if token is None else token for token in request.ids]
    text, fills, before, tokens_per_hole = "", list[str](), list[int](), 0
    for is_hole, positions in groupby(range(len(ids)), key=lambda position: request.ids[position] is None):
        part = [ids[position] for position in positions]
        if is_hole:
            tokens_per_hole = tokens_per_hole or len(part)
            fills.append(tokenizer.decode(part, after=before))
            text += fills[-1]
        else:
            # Apart from the fillings, whose broken bytes would spoil it; but within a text.
            text += tokenizer.decode(part, after=part if fills else ())
            before = part
    return Infilling(
        text=text,
        fills=tuple(fills),
        tokens_per_hole=tokens_per_hole,
        score=scores[best],
        forwards=sum(completion.forwards for completion in completions),
        seconds=decoding_seconds([completion.costs for completion in completions]),
    )
