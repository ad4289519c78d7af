"""What a text is like: a refusal, a repetition, a near copy of another."""

import re
from collections import Counter
from functools import lru_cache

import numpy as np
import xxhash

# "I can't wait to see you" and the like are no refusals.
_IDIOMS = r"(?:wait|thank|stress|emphasi|imagine|promise|guarantee|help but|recommend \w+ enough)"


REFUSALS = (
    rf"\b(?:i|we) (?:can't|cannot|can not|could not|couldn't|won't|will not) (?!{_IDIOMS})",
    r"\b(?:i|we)(?:'m|'re| am| are) unable to\b",
    r"\b(?:i|we)(?:'m|'re| am| are) not (?:able|allowed|permitted|authori[sz]ed|comfortable|willing)\b",
    r"\b(?:i|we) (?:(?:must|have to|need to) (?:decline|refuse)|decline to|refuse to)\b",
    r"\b(?:i|we) (?:don't|do not) (?:feel comfortable|have (?:access|permission|the ability))\b",
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b",
    r"\b(?:against|violates?) (?:my|our) (?:guidelines|polic(?:y|ies)|programming)\b",
)


PHRASE_REPEATS = 4


_REFUSAL = re.compile("|".join(REFUSALS), re.IGNORECASE)


def refuses(text: str) -> bool:
    """Whether an answer opens with a refusal: one of REFUSALS within its first 200 characters.

    A rule of phrases, not a classifier: it misses refusals in other words ("that information is private") and
    takes "I can't see your file, but ..." for one. It treats every system alike, as a comparison needs.
    """
    return bool(_REFUSAL.search(" ".join(text[:200].replace("’", "'").split())))


def repeats_phrase(text: str) -> bool:
    """Whether some sequence of four words occurs four times or more (overlapping occurrences count)."""
    return max(Counter(ngrams(text, 4)).values(), default=0) >= PHRASE_REPEATS


def distinct_2(text: str) -> float | None:
    """Different word bigrams over all word bigrams (Li et al. 2016); None for fewer than two words."""
    bigrams = ngrams(text, 2)
    return len(set(bigrams)) / len(bigrams) if bigrams else None


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """All sequences of n words, in order."""
    tokens = _words(text)
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


WORD = re.compile(r"\w+(?:'\w+)?")


BANDS, ROWS = 8, 4


# Odd, so that each permutes the 64-bit numbers.
FACTORS = np.array([xxhash.xxh3_64_intdigest(b"", seed=n) | 1 for n in range(BANDS * ROWS)], np.uint64)


def words(text: str) -> list[str]:
    return list(_words(text))


@lru_cache(64)  # several rules look at a text, one after another
def _words(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text.lower().replace("’", "'")))


def jaccard(a: str, b: str) -> float:
    """|A and B| / |A or B| of the words; 1 for two texts without words."""
    left, right = set(_words(a)), set(_words(b))
    return len(left & right) / len(left | right) if left | right else 1.0


def near_duplicate_keys(text: str) -> np.ndarray:
    """Keys, uint64 of shape (BANDS,), of which near-duplicates share one: MinHash over sequences of five words, in
    `BANDS` bands of `ROWS` values (Broder 1997). Two texts with Jaccard similarity s share a key with probability
    1 - (1 - s^4)^8: 0.985 at 0.8, 0.06 at 0.3."""
    tokens = _words(text)
    shingles = {" ".join(tokens[i : i + 5]) for i in range(max(1, len(tokens) - 4))}
    hashes_S = np.array([xxhash.xxh3_64_intdigest(each.encode()) for each in shingles], np.uint64)
    least = (hashes_S[:, None] * FACTORS).min(0).reshape(BANDS, ROWS)
    return np.array([xxhash.xxh3_64_intdigest(row.tobytes(), seed=n) for n, row in enumerate(least)], np.uint64)
