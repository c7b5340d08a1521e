"""Which picture is the i-th of a training run: a pure function of seed and i."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Separate the random streams that grow out of one seed.
_ORDER, _AUGMENTATION = 0, 1


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
        self.batches_per_epoch = sum(-(-len(group) // batch_size) for group in groups)
        self._epoch, self._order = None, None

    def batch(self, index: int) -> tuple[int, np.ndarray]:
        """The batch at an index, counted from the start of training.

        Returns:
            the number of its group, and the positions of its pictures, int [batch_size].
        """
        epoch, position = divmod(index, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._draw(epoch)
        return self._order[position]

    def generator(self, index: int, row: int) -> np.random.Generator:
        """The source of randomness for the augmentation of row `row` of batch `index`."""
        return np.random.default_rng((self.seed, _AUGMENTATION, index * self.batch_size + row))

    def _draw(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        rng = np.random.default_rng((self.seed, _ORDER, epoch))
        batches = []
        for number, group in enumerate(self.groups):
            count = -(-len(group) // self.batch_size)
            if count:
                rows = np.resize(rng.permutation(group), (count, self.batch_size))
                batches += [(number, row) for row in rows]
        return [batches[i] for i in rng.permutation(len(batches))]
