"""Duplicates among prompts: the same after normalization, or nearly the same by the words they share, and with the same
pictures, or pictures that look the same. Another question about a picture, and the question about another picture, are
no duplicates.

Near duplicates are found by MinHash signatures of word n-grams (Broder 1997) in bands, and each candidate is settled by
its true Jaccard similarity: banding can miss a pair and cannot make one up.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perigee.curation.findings import Decision, Finding, Question
from perigee.curation.pictures import Look, find_same

_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[^\w\s]|_")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def normalize(text: str) -> str:
    """Returns the text without differences of case, Unicode form and white space, and without punctuation at its end.

    Signs inside it stay: 2+3 and 2-3 are two questions.
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .?!:;")


def tokens(text: str) -> list[str]:
    """Returns words, numbers and single signs of a normalized text."""
    return _TOKEN.findall(text)


def numbers(text: str) -> list[str]:
    """Returns the numbers of a text, sorted: questions of one template with other numbers are other questions."""
    return sorted(_NUMBER.findall(text))


def ngrams(words: list[str], length: int) -> set[str]:
    """Returns all runs of `length` words; a shorter text is one run."""
    if len(words) <= length:
        return {" ".join(words)}
    return {" ".join(words[start : start + length]) for start in range(len(words) - length + 1)}


NGRAM_WORDS = 4
PERMUTATIONS = 128
# Share of the pairs at the threshold that banding finds.
MIN_RECALL = 0.999
_SEED = 20250122

Hashes = npt.NDArray[np.uint64]
# Digests of a prompt's pictures, those that look the same as an earlier one by the earlier one's.
Pictures = tuple[str, ...]


@dataclass
class _Kept:
    """Prompt that later ones are compared with."""

    id: str
    grams: Hashes
    numbers: list[str]


def find_duplicates(
    questions: Sequence[Question], threshold: float, look: Callable[[str], Look] | None = None
) -> Iterator[Finding]:
    """Yields a finding per prompt, in order; of duplicates the first stays. A threshold of 0 finds exact ones alone.

    Near duplicates have a Jaccard similarity of at least `threshold` and the same numbers: the same story about other
    numbers has another answer. `look` looks at a picture by its digest.
    """
    exact: dict[tuple[str, Pictures], Question] = {}
    index = BandIndex(threshold) if threshold > 0 else None
    same = group_pictures(questions, look) if threshold > 0 and look is not None else {}
    for question in questions:
        text, pictures = normalize(question.text), tuple(same.get(digest, digest) for digest in question.images)
        first = exact.setdefault((text, pictures), question)
        if first is not question:
            kind = "exact duplicate" if first.images == question.images else "near duplicate"
            yield Finding(question.id, Decision.DROP, kind, {"duplicate_of": first.id})
            continue
        near = index.add(question.id, text, pictures) if index is not None else None
        if near is None:
            yield Finding(question.id)
        else:
            details = {"duplicate_of": near[0], "jaccard": round(near[1], 4)}
            yield Finding(question.id, Decision.DROP, "near duplicate", details)


def group_pictures(questions: Iterable[Question], look: Callable[[str], Look]) -> dict[str, str]:
    """Returns for each picture the first one that looks the same, by their digests."""
    digests = list(dict.fromkeys(digest for question in questions for digest in question.images))
    places = find_same([look(digest) for digest in digests])
    return {digest: digests[place] for digest, place in zip(digests, places, strict=True)}


class BandIndex:
    """Prompts kept so far, found again by any band of their signatures."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._rows = choose_rows(threshold)
        self._bands = PERMUTATIONS // self._rows
        self._kept: list[_Kept] = []
        self._buckets: list[defaultdict[tuple[bytes, Pictures], list[int]]] = [
            defaultdict(list) for _ in range(self._bands)
        ]

    def add(self, question_id: str, text: str, pictures: Pictures = ()) -> tuple[str, float] | None:
        """Returns the most similar prompt kept with these pictures, if it is a near duplicate, and how similar; else
        keeps this prompt.
        """
        found = _Kept(question_id, hash_grams(text), numbers(text))
        bands = signature(found.grams)[: self._bands * self._rows].reshape(self._bands, -1)
        keys = [(band.tobytes(), pictures) for band in bands]
        candidates = {
            place for bucket, key in zip(self._buckets, keys, strict=True) for place in bucket.get(key, ())
        }  # fmt: skip
        best: tuple[str, float] | None = None
        for place in sorted(candidates):
            other = self._kept[place]
            if other.numbers != found.numbers:
                continue
            similarity = jaccard(found.grams, other.grams)
            if similarity >= self._threshold and (best is None or similarity > best[1]):
                best = other.id, similarity
        if best is None:
            for bucket, key in zip(self._buckets, keys, strict=True):
                bucket[key].append(len(self._kept))
            self._kept.append(found)
        return best


def choose_rows(threshold: float) -> int:
    """Returns the rows of a band: the most that still find a pair at the threshold with a probability of MIN_RECALL.

    A pair of similarity s shares a band of r rows with probability s^r, so one of b bands with 1 - (1 - s^r)^b.
    """
    fitting = [
        rows for rows in range(1, PERMUTATIONS + 1) if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= MIN_RECALL
    ]
    return max(fitting, default=1)


def hash_grams(text: str) -> Hashes:
    """Returns sorted 64-bit hashes of the text's distinct n-grams, shape (grams,)."""
    grams = ngrams(tokens(text), NGRAM_WORDS)
    digests = b"".join(hashlib.blake2b(gram.encode(), digest_size=8).digest() for gram in grams)
    return np.unique(np.frombuffer(digests, np.uint64))


def signature(grams: Hashes) -> Hashes:
    """Returns the smallest value of each permutation over the grams, shape (PERMUTATIONS,)."""
    values_GP = grams[:, None] * _MULTIPLIERS + _OFFSETS  # wraps around at 2^64
    smallest: Hashes = (values_GP >> np.uint64(32)).min(axis=0)
    return smallest


def jaccard(one: Hashes, other: Hashes) -> float:
    """Returns shared grams over all grams; the arrays hold distinct values."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


_random = np.random.default_rng(_SEED)
# Multiply-shift hashing (Dietzfelbinger et al. 1997): odd multipliers, the upper half of the product.
_MULTIPLIERS = _random.integers(0, 1 << 64, PERMUTATIONS, dtype=np.uint64) | np.uint64(1)
_OFFSETS = _random.integers(0, 1 << 64, PERMUTATIONS, dtype=np.uint64)
