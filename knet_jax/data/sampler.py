"""Which picture is the i-th of a training run: a pure function of seed and i."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Separate the random streams that grow out of one seed.
_ORDER, _AUGMENTATION = 0, 1
DRAWN = 1 << 20
"""So many positions, or fewer, are shuffled in memory."""
ROUNDS = 8
"""Of a Feistel network; four make it a good permutation, in theory."""


class EpochSampler:
    """An endless sequence of batches. Each is of one group, and an epoch shows every picture.

    Every epoch shuffles each group, cuts it into batches (the last one is filled up from the
    group's start, so up to a batch less one of its pictures occur twice) and shuffles the batches.

    Args:
        groups: positions of pictures, an int array for each group.
        batch_size: pictures in a batch.
        seed: of the order and of the augmentation.
    """

    def __init__(self, groups: Sequence[np.ndarray], batch_size: int, seed: int):
        self.groups = tuple(groups)
        self.batch_size = batch_size
        self.seed = seed
        counts = [-(-len(group) // batch_size) for group in groups]
        self._starts = np.cumsum([0, *counts])
        self.batches_per_epoch = int(self._starts[-1])
        self._epoch = None

    def batch(self, index: int) -> tuple[int, np.ndarray]:
        """The batch at an index, counted from the start of training.

        Returns:
            the number of its group, and the positions of its pictures, int [batch_size].
        """
        epoch, position = divmod(index, self.batches_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, _ORDER, epoch))
            self._members = [_shuffled(len(group), rng) for group in self.groups]
            self._batches = _shuffled(self.batches_per_epoch, rng)
            self._epoch = epoch
        position = int(self._batches[position])
        number = int(np.searchsorted(self._starts, position, "right")) - 1
        start = (position - self._starts[number]) * self.batch_size
        group = self.groups[number]
        rows = np.arange(start, start + self.batch_size) % len(group)
        return number, group[self._members[number][rows]]

    def generator(self, index: int, row: int) -> np.random.Generator:
        """The source of randomness for the augmentation of row `row` of batch `index`."""
        return np.random.default_rng((self.seed, _AUGMENTATION, index * self.batch_size + row))


def _shuffled(count: int, rng: np.random.Generator) -> np.ndarray | Shuffled:
    """The numbers below `count` in a random order: an array, or what is indexed like one."""
    return rng.permutation(count) if count <= DRAWN else Shuffled(count, rng)


class Shuffled:
    """A random order of the numbers below `count`, of which none is held in memory.

    A Feistel network permutes the numbers of an even number of bits; what leads beyond `count` is led
    on until it comes back (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).

    Args:
        count: how many numbers there are.
        rng: source of randomness.
    """

    def __init__(self, count: int, rng: np.random.Generator):
        self._count = count
        self._bits = np.uint64((count - 1).bit_length() + 1 >> 1)
        self._keys = rng.integers(1 << 64, size=ROUNDS, dtype=np.uint64)

    def __getitem__(self, places: np.ndarray | int) -> np.ndarray:
        """The numbers at some places, int64 of their shape."""
        numbers = self._permute(np.array(places, np.uint64))
        while (beyond := numbers >= self._count).any():
            numbers = np.where(beyond, self._permute(numbers), numbers)
        return numbers.astype(np.int64)

    def _permute(self, numbers: np.ndarray) -> np.ndarray:
        low = np.uint64((1 << int(self._bits)) - 1)
        left, right = numbers >> self._bits, numbers & low
        for key in self._keys:
            left, right = right, left ^ (_scramble(right ^ key) & low)
        return left << self._bits | right


def _scramble(numbers: np.ndarray) -> np.ndarray:
    """Mixes the bits of uint64 numbers (the last steps of splitmix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(31))
