"""N-gram drafts: the token that most often followed the last ones in text that a model wrote before.

Owns the table, its file, and how it is counted. What a draft is worth is `engine.drafting`'s matter. Prompt lookup
(`engine.lookup`) drafts from the request's own text; this is the same for all requests of a model.

Legend: N tokens of all texts, E entries of the table.
"""

from __future__ import annotations

import zipfile
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unmask.data.documents import Document
from unmask.errors import CheckpointError, DataError
from unmask.files import atomic_write
from unmask.models.weights.hub import ngrams_path

LONGEST_CONTEXT = 4
_LEAST_COUNT = 2
_DOUBT = (2.5, 2.0, 1.5, 1.2)
"""By the length of the context: added to the number of its occurrences where the share of a token becomes a probability, since
what was most frequent among few is less probable than its share."""
_LIKE = 0.25
"""A context is left out where the table says the same of the shorter one, with a probability no farther than this away."""
_UNLIKELY = 0.15
"""And where both are less probable than this."""
_FORMAT = 1
_SEED, _FACTOR, _SHIFT, _WORD = 0x243F6A8885A308D3, 0x9E3779B97F4A7C15, 29, 2**64 - 1
_BUCKET_BITS = 16
_MOST_ASKED = 64
"""Contexts that are remembered with what was said of them."""

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]
Told = dict[int, tuple[int, float]]
"""By the key of a context: the token that follows, and its probability."""


class NextToken(NamedTuple):
    """A draft of the next token, and the probability that it follows."""

    token: int
    probability: float


class NgramTable:
    """The likeliest next token by the last tokens of a text, the longest context of at most `LONGEST_CONTEXT` that is known.

    Contexts are told apart by 32 bits of a hash: of unknown ones about one in ten thousand is taken for a known one, which
    costs a rejected draft.

    Args:
        keys: of the contexts, increasing; uint32 [E].
        tokens: that follow; uint32 [E].
        probabilities: in units of 1 / 255; uint8 [E].
    """

    def __init__(self, keys: NDArray[np.uint32], tokens: NDArray[np.uint32], probabilities: NDArray[np.uint8]) -> None:
        self.keys, self.tokens, self.probabilities = keys, tokens, probabilities
        self._keys, self._tokens, self._shares = keys.data, tokens.data, probabilities.data
        edges = np.arange(2**_BUCKET_BITS + 1, dtype=np.uint64) << np.uint64(32 - _BUCKET_BITS)
        self._starts: list[int] = np.searchsorted(keys.astype(np.uint64), edges).tolist()
        # Most are asked for twice: to draft, and to learn whether that was right.
        self._asked: dict[tuple[int, ...], NextToken | None] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def next(self, tokens: Sequence[int], stop: int | None = None) -> NextToken | None:
        """What follows a text, or its first `stop` tokens, most often; None: its end is not known."""
        place = len(tokens) if stop is None else stop
        context = tuple(tokens[max(0, place - LONGEST_CONTEXT) : place])
        asked = self._asked  # engines in other threads may begin anew meanwhile
        if context not in asked:
            if len(asked) >= _MOST_ASKED:
                asked = self._asked = {}
            asked[context] = self._find(context)
        return asked[context]

    def _find(self, context: tuple[int, ...]) -> NextToken | None:
        found, hashed = -1, _SEED
        for token in reversed(context):
            hashed = ((hashed ^ (token + 1)) * _FACTOR) & _WORD
            hashed ^= hashed >> _SHIFT
            key = hashed >> 32
            bucket = key >> (32 - _BUCKET_BITS)
            first, last = self._starts[bucket], self._starts[bucket + 1]
            entry = bisect_left(self._keys, key, first, last)
            if entry < last and self._keys[entry] == key:
                found = entry
        return None if found < 0 else NextToken(self._tokens[found], self._shares[found] / 255)

    def save(self, path: Path) -> None:
        """Write the file.

        Raises:
            CheckpointError: the disk is full, or the folder cannot be written.
        """
        arrays: dict[str, Any] = {"keys": self.keys, "tokens": self.tokens, "probabilities": self.probabilities}
        atomic_write(path, lambda file: np.savez(file, format=np.array(_FORMAT), **arrays))


def find_ngrams(model: str, folder: Path | None, vocab_size: int) -> NgramTable | None:
    """The table of a model, by its name and folder (`ngrams_path`); None: it has none.

    Raises:
        CheckpointError: as of `load_ngrams`.
    """
    path = ngrams_path(model, folder)
    return None if path is None else load_ngrams(path, vocab_size)


def load_ngrams(path: Path, vocab_size: int) -> NgramTable:
    """Read a table.

    Raises:
        CheckpointError: the file is damaged, of another version, or of a model with more tokens.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[name] for name in ("format", "keys", "tokens", "probabilities")]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); count it again (unmask ngrams), or remove it") from error
    version, keys, tokens, probabilities = arrays
    kinds = [array.dtype for array in (keys, tokens, probabilities)]
    sizes = {array.shape for array in (keys, tokens, probabilities)}
    if version != _FORMAT or kinds != [np.uint32, np.uint32, np.uint8] or len(sizes) != 1 or keys.ndim != 1:
        raise CheckpointError(f"{path} is not a table of n-grams of this version; count it again (unmask ngrams), or remove it")
    if len(tokens) and (int(tokens.max()) >= vocab_size or (np.diff(keys.astype(np.int64)) <= 0).any()):
        raise CheckpointError(
            f"{path} does not fit the model: its contexts are not in order, or its token {tokens.max()} is not below the "
            f"vocabulary's {vocab_size}; count it again (unmask ngrams)"
        )
    return NgramTable(keys, tokens, probabilities)


def count_ngrams(documents: Iterable[Document]) -> NgramTable:
    """Count which token follows which last tokens.

    Args:
        documents: of text that the model wrote: only maskable tokens are counted, each after all that is before it.

    Raises:
        DataError: nothing is maskable in any of them, or no continuation occurs twice.
    """
    parts = [(document.tokens.astype(np.int64), document.maskable) for document in documents]
    if not any(written.any() for _, written in parts):
        raise DataError("the data holds no text that the model writes: answers, or whole documents")
    tokens_N, written_N = (np.concatenate(each) for each in zip(*parts, strict=True))
    lengths = [len(tokens) for tokens, _ in parts]
    place_N = np.arange(len(tokens_N)) - np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    hashed_N = np.full(len(tokens_N), _SEED, np.uint64)
    entries: Told = {}
    shorter_N = np.zeros(len(tokens_N), np.uint64)  # the key of the context that is a token shorter
    told: Told = {}
    for length in range(1, LONGEST_CONTEXT + 1):
        hashed_N[length:] = _mixed(hashed_N[length:], tokens_N[:-length])
        key_N = hashed_N >> np.uint64(32)
        at = np.flatnonzero(written_N & (place_N >= length))
        told = _add_likeliest(entries, told, key_N[at], shorter_N[at], tokens_N[at], length)
        shorter_N = key_N
    if not entries:
        raise DataError(f"no continuation occurs {_LEAST_COUNT} times in the data; give more text that the model wrote")
    order = sorted(entries)
    tokens, probabilities = zip(*(entries[key] for key in order), strict=True)
    shares = np.round(255 * np.array(probabilities)).astype(np.uint8)
    return NgramTable(np.array(order, np.uint32), np.array(tokens, np.uint32), shares)


def merge_tables(tables: Sequence[NgramTable]) -> NgramTable:
    """A table of all contexts that any of these has; where several do, the surest says what follows, of equals the first."""
    keys, tokens, probabilities = (
        np.concatenate([getattr(table, name) for table in tables]) for name in ("keys", "tokens", "probabilities")
    )
    order = np.lexsort((-probabilities.astype(np.int64), keys))
    chosen = order[_first_of_runs(keys[order])]
    return NgramTable(keys[chosen], tokens[chosen], probabilities[chosen])


def _mixed(hashed: Keys, tokens: Ints) -> Keys:
    """The hash of contexts with one more token in front; wraps around like `NgramTable.next`'s."""
    mixed = (hashed ^ (tokens.astype(np.uint64) + np.uint64(1))) * np.uint64(_FACTOR)
    return np.asarray(mixed ^ (mixed >> np.uint64(_SHIFT)))


def _add_likeliest(entries: Told, told: Told, key: Keys, shorter: Keys, token: Ints, length: int) -> Told:
    """Add the contexts of one length, each with its most frequent token, where that tells more than the shorter context.

    Args:
        entries: of the table, which grow.
        told: what the table says of contexts that are a token shorter.
        key: of the context of each token that was written.
        shorter: of its context that is a token shorter.
        token: that was written.
        length: of the contexts.

    Returns:
        What the table says of contexts of this length.
    """
    order = np.lexsort((token, key))
    key, shorter, token = key[order], shorter[order], token[order]
    at = _first_of_runs(key, token)
    counts, key, shorter, token = np.diff(np.append(at, len(key))), key[at], shorter[at], token[at]
    first = _first_of_runs(key)
    totals = np.add.reduceat(counts, first) if len(first) else counts
    # The most frequent of each context comes first; of equals the smaller id.
    best = np.lexsort((token, -counts, key))[first]
    known = counts[best] >= _LEAST_COUNT
    now: Told = {}
    for i, total in zip(best[known].tolist(), totals[known].tolist(), strict=True):
        likeliest = int(token[i]), (int(counts[i]) - 0.5) / (total + _DOUBT[length - 1])
        before = told.get(int(shorter[i]), (-1, 0.0))
        is_alike = likeliest[0] == before[0] and abs(likeliest[1] - before[1]) <= _LIKE
        if is_alike or max(likeliest[1], before[1]) < _UNLIKELY:
            now[int(key[i])] = before
        else:
            now[int(key[i])] = entries.setdefault(int(key[i]), likeliest)
    return now


def _first_of_runs(*sorted_columns: NDArray[Any]) -> NDArray[np.intp]:
    """Where rows of equal values begin."""
    begins = np.ones(len(sorted_columns[0]), np.bool_)
    begins[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in sorted_columns])
    return np.flatnonzero(begins)
