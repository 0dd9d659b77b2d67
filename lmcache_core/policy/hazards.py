"""Hazards: how soon chunks of each class are used again, counted as the store runs.

An *episode* begins with a use of a chunk and ends with its next one, or is given up after 8 times
what the store holds. From the episodes of one key in 2^n, whatever has become of their chunks,
follows for each class and age the hazard of a return, and from the hazards the Gittins index: the
most returns for the room taken that keeping a chunk of this class and age from now on can give
(Aalto, Ayesta and Righter, 2009; for caches: EVA, Beckmann and Sanchez, HPCA 2017).

The youngest of these episodes, as many as the store has chunks of such keys, are also what LRU
would hold: the hits that it would have had come for nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

import numpy as np

from lmcache_core.policy.lists import AGES, age_bucket

_SAMPLE = 8192
"""Episodes that are followed at a time."""
_FINEST = 16
"""One key in 2^16 is the least to be followed: for 33 million chunks."""
_LENGTHS = 8
"""Times the store's content for which an episode is followed."""
_HALF_LIFE = 1 << 14
"""Uses of chunks after which an episode counts half, or 8 times the store's content if more."""
_PRIOR = 64.0
"""Episodes of the average class that each class is taken to have had already."""
_STAY = 0.12
"""Part of the mean age at eviction that any chunk is taken to stay at least: keeps a burst of new
prompts from ranking above all else."""
_BITS = 4

_FIRST = np.array([0.0] + [2.0 ** ((j - 1) / 2) for j in range(1, AGES + 1)])
_WIDTH = np.maximum(np.diff(_FIRST), 0.5)


class Hazards:
    """Episodes of a sample of keys, by class (a number below 16) and age."""

    def __init__(self, classes: int) -> None:
        self.uses = 0.0
        """Of the sample: all uses,"""
        self.won = 0.0
        """those of chunks that the store had and LRU would not,"""
        self.lost = 0.0
        """that LRU would have had and the store had not,"""
        self.near_hits = 0.0
        """and that LRU would have had with more room, up to twice of it."""
        self.lru_hits = 0.0
        self.unseen = 0.0
        """Part of all keys that is not in the sample."""
        self.mask = (0, 0)
        """A key is in the sample where neither of its last two bytes has a bit of these."""
        self._shift = 0
        self._classes = classes
        self._stored = 0
        self._counted = True
        self._held: OrderedDict[bytes, int] = OrderedDict()
        self._past: OrderedDict[bytes, int] = OrderedDict()
        self._returned = [0.0] * (classes * AGES)
        self._ended = [0.0] * (classes * AGES)
        self._base = 0
        self._rate = 1.0 / _HALF_LIFE
        self._stay = 0.0

    def use(self, key: bytes, kind: int, now: int, there: bool) -> None:
        """A chunk of class `kind` is used; whether the store had it."""
        self.uses += 1
        episode = self._held.pop(key, None)
        if episode is not None:
            self.lru_hits += 1
            self.lost += not there
            self._end(episode, now, 1.0)
        else:
            self.won += there
            episode = self._past.pop(key, None)
            if episode is not None:
                self._end(episode, now, 1.0)
                self._count_near(episode, now)
        self._begin(key, kind, now)

    def place(self, key: bytes, kind: int, now: int) -> None:
        """A chunk's class is another, or a store passed along it: its episode begins now."""
        if self._held.pop(key, None) is None:
            self._past.pop(key, None)
        self._begin(key, kind, now)

    def added(self) -> None:
        """A chunk of the sample is stored."""
        self._stored += 1

    def removed(self, key: bytes) -> None:
        """A chunk is stored no more."""
        if self.sampled(key):
            self._stored -= 1
            self._trim()

    def evicted(self, key: bytes, age: int) -> None:
        """A chunk that was last used so long ago had to leave."""
        self._stay += (age - self._stay) / 2000
        self.removed(key)

    def _begin(self, key: bytes, kind: int, now: int) -> None:
        self._held[key] = now << _BITS | kind
        if len(self._held) > _SAMPLE and self._shift < _FINEST:
            self._halve()
        self._trim()
        if len(self._past) > (_LENGTHS - 1) * self._stored + 64:
            _, episode = self._past.popitem(last=False)
            self._end(episode, now, 0.0)

    def _trim(self) -> None:
        """Let go of what LRU would have no room for. A little more than that: a scan that is one
        chunk too long for the store may be one that fits, by the sample."""
        holds = self._stored - 1 - (self._stored >> 7)
        while len(self._held) > max(0, holds):
            key, episode = self._held.popitem(last=False)
            self._past[key] = episode

    def _end(self, episode: int, now: int, returned: float) -> None:
        began = episode >> _BITS
        at = (episode & 15) * AGES + age_bucket(now - began)
        weight = 2.0 ** ((began - self._base) * self._rate)
        self._ended[at] += weight
        self._returned[at] += weight * returned

    def _count_near(self, episode: int, now: int) -> None:
        oldest = next(iter(self._held.values()), 0) >> _BITS
        if now - (episode >> _BITS) < 2 * (now - oldest):
            self.near_hits += 1

    def index(self, now: int, stored: Collection[bytes]) -> np.ndarray:
        """The Gittins index by class and age, for a store of these chunks."""
        self._resize(stored)
        self._fade(now, len(stored))
        returned = np.array(self._returned).reshape(self._classes, AGES)
        exposed = np.array(self._ended).reshape(self._classes, AGES) + self._open(now)
        exposed = np.cumsum(exposed[:, ::-1], axis=1)[:, ::-1]
        prior = max(4.0, _PRIOR / (1 << self._shift))
        mean = returned.sum(axis=0) / np.maximum(exposed.sum(axis=0), 1e-9)
        hazard = np.minimum(0.999, (returned + prior * mean) / (exposed + prior))
        return _gittins(hazard, _STAY * self._stay + 1e-3)

    def _open(self, now: int) -> np.ndarray:
        """Weights of the episodes that have not ended."""
        count = len(self._held) + len(self._past)
        held, past = self._held.values(), self._past.values()
        episodes = np.fromiter((*past, *held), np.int64, count)
        began = episodes >> _BITS
        ages = np.maximum(now - began, 0)
        bits = np.frexp(np.square(ages.astype(np.float64)))[1]
        buckets = np.minimum(np.where(ages > 0, bits, 0), AGES - 1)
        weights = np.exp2((began - self._base) * self._rate)
        places = (episodes & 15) * AGES + buckets
        total = np.bincount(places, weights, self._classes * AGES)
        return total.reshape(self._classes, AGES)

    def _fade(self, now: int, length: int) -> None:
        """Let what was counted so far count less."""
        factor = 2.0 ** ((self._base - now) * self._rate)
        self._ended = [each * factor for each in self._ended]
        self._returned = [each * factor for each in self._returned]
        self._base = now
        self._rate = 1.0 / max(_HALF_LIFE, 8 * length)
        for name in ("uses", "won", "lost", "near_hits", "lru_hits"):
            setattr(self, name, getattr(self, name) * factor)

    def _resize(self, stored: Collection[bytes]) -> None:
        """Follow as many keys as `_SAMPLE` episodes allow, and know how many of them are stored."""
        while _LENGTHS * len(stored) >> self._shift > _SAMPLE and self._shift < _FINEST:
            self._halve()
        if not self._counted:
            self._stored = sum(map(self.sampled, stored))
            self._counted = True

    def _halve(self) -> None:
        """Take half of the keys out of the sample."""
        shift = self._shift = self._shift + 1
        self.unseen = 1.0 - 0.5**shift
        self.mask = ((1 << min(shift, 8)) - 1, (1 << max(0, shift - 8)) - 1)
        self._held = self._of_sample(self._held)
        self._past = self._of_sample(self._past)
        self._stored //= 2
        self._counted = False

    def _of_sample(self, episodes: OrderedDict[bytes, int]) -> OrderedDict[bytes, int]:
        """A dictionary of its own size: one that lost most of what it had keeps its memory."""
        return OrderedDict((key, each) for key, each in episodes.items() if self.sampled(key))

    def sampled(self, key: bytes) -> bool:
        return not (key[-1] & self.mask[0] or key[-2] & self.mask[1])


def _gittins(hazard: np.ndarray, stay: float) -> np.ndarray:
    """For each class and age the most, over all ages to leave at, of the chance to return before
    by the time stayed until then, `stay` at least."""
    alive = np.cumprod(1 - hazard, axis=1)
    alive = np.concatenate([np.ones((len(hazard), 1)), alive], axis=1)
    time = alive[:, :-1] * (1 - hazard / 2) * _WIDTH
    time = np.concatenate([np.zeros((len(hazard), 1)), np.cumsum(time, axis=1)], axis=1)
    returns = alive[:, :-1, None] - alive[:, None, 1:]
    stays = time[:, None, 1:] - time[:, :-1, None] + stay * alive[:, :-1, None]
    ratio = np.where(np.triu(np.ones((AGES, AGES), bool)), returns / np.maximum(stays, 1e-12), 0)
    best = ratio.max(axis=2)
    index: np.ndarray = np.maximum.accumulate(best[:, ::-1], axis=1)[:, ::-1]
    return index
