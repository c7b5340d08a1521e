import itertools

import numpy as np
import pytest

from knet_jax.data import sampler

GROUPS = (np.array([0, 2, 3, 5, 6, 8, 9]), np.array([1, 4, 7]))


@pytest.fixture(params=["drawn", "by index"], autouse=True)
def way(request, monkeypatch):
    """Orders of few pictures are drawn; here they are tried as those of many, too."""
    if request.param == "by index":
        monkeypatch.setattr(sampler, "DRAWN", 0)


def epoch(epochs, number):
    size = epochs.batches_per_epoch
    return [epochs.batch(number * size + i) for i in range(size)]


def test_an_epoch_shows_everything_in_batches_of_one_group():
    for batch_size, number, group in itertools.product((1, 2, 4, 8), range(3), (0, 1)):
        epochs = sampler.EpochSampler(GROUPS, batch_size, seed=1)
        assert epochs.batches_per_epoch == -(-7 // batch_size) + -(-3 // batch_size)
        batches = [members for of, members in epoch(epochs, number) if of == group]
        shown, counts = np.unique(np.concatenate(batches), return_counts=True)
        np.testing.assert_array_equal(shown, GROUPS[group])
        assert counts.max() - counts.min() <= 1  # filling up is spread evenly
        assert all(len(members) == batch_size for members in batches)


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, number):
        epochs = sampler.EpochSampler(GROUPS, 2, seed)
        return [members.tolist() for _, members in epoch(epochs, number)]

    assert order(3, 5) == order(3, 5)
    assert order(3, 5) != order(4, 5)
    assert order(3, 5) != order(3, 6)


def test_batches_of_the_groups_are_mixed():
    groups = (np.arange(100), np.arange(100, 200))
    order = [group for group, _ in epoch(sampler.EpochSampler(groups, 4, seed=0), 0)]
    assert order != sorted(order) and sum(order[:25]) not in (0, 25)


def test_one_group_is_enough():
    epochs = sampler.EpochSampler((np.arange(5), np.array([], int)), 2, seed=0)
    assert epochs.batches_per_epoch == 3
    assert {group for group, _ in epoch(epochs, 0)} == {0}


def test_generators_differ_between_examples():
    epochs = sampler.EpochSampler(GROUPS, 2, seed=0)
    draws = [epochs.generator(i, row).random() for i in range(50) for row in range(2)]
    assert len(set(draws)) == 100
    assert epochs.generator(10, 1).random() == draws[21]


def test_orders_by_index():
    for count in (1, 2, 3, 100, 257, 4096):
        order = sampler.Shuffled(count, np.random.default_rng(0))
        np.testing.assert_array_equal(np.sort(order[np.arange(count)]), np.arange(count))
    # Any place leads anywhere, and neighbours part: chi-square of 16 bins, and of their distances.
    orders = [sampler.Shuffled(3 << 20, np.random.default_rng(i))[np.arange(8)] for i in range(500)]
    for numbers in (np.array(orders), np.diff(orders) % (3 << 20)):
        counts, _ = np.histogram(numbers, 16, (0, 3 << 20))
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 40
