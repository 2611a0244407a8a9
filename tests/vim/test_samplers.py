"""Samplers: which process sees what; seeds that depend on nothing but the run's seed, the epoch and the place."""

import random
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from datasets import Replaced, Unreadable, collate_readable
from samplers import Draw, DrawBatches, RASampler, SeededPictures, ShardSampler, ShuffledSampler

SIZES, RANKS, SEEDS = st.integers(1, 700), st.integers(1, 9), st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 300)


def over_ranks(make, replicas) -> list[list[int]]:
    """What each rank sees."""
    return [list(make(rank)) for rank in range(replicas)]


def set_to(sampler, epoch):
    sampler.set_epoch(epoch)
    return sampler


@settings(deadline=None)
@given(size=st.integers(0, 700), replicas=RANKS)
def test_shards_are_a_partition(size, replicas):
    parts = over_ranks(lambda rank: ShardSampler(range(size), replicas, rank), replicas)
    assert sorted(chain(*parts)) == list(range(size))
    assert all(len(ShardSampler(range(size), replicas, rank)) == len(part) for rank, part in enumerate(parts))


@settings(deadline=None)
@given(size=SIZES, replicas=RANKS, seed=SEEDS, epoch=EPOCHS)
def test_shuffled_ranks_see_together_what_one_process_sees(size, replicas, seed, epoch):
    parts = over_ranks(lambda rank: set_to(ShuffledSampler(range(size), replicas, rank, seed=seed), epoch), replicas)
    alone = list(set_to(ShuffledSampler(range(size), seed=seed), epoch))
    assert sorted(alone) == list(range(size))
    assert {len(part) for part in parts} == {size // replicas}
    assert len(ShuffledSampler(range(size), replicas, 0)) == size // replicas
    for step, together in enumerate(zip(*parts, strict=True)):
        assert list(together) == alone[step * replicas : (step + 1) * replicas]


def test_the_order_depends_on_seed_and_epoch():
    orders = {tuple(set_to(ShuffledSampler(range(50), seed=seed), epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    torch.manual_seed(7)
    once = list(ShuffledSampler(range(50)))
    torch.manual_seed(8)
    assert list(ShuffledSampler(range(50))) == once


def repeated_by_definition(size, replicas, rank, repeats, epoch, shuffle) -> list[int]:
    """Repeat, pad, deal out, cut: section 5.7 of the specification."""
    generator = torch.Generator().manual_seed(epoch)
    order = torch.randperm(size, generator=generator).tolist() if shuffle else list(range(size))
    repeated = [index for index in order for _ in range(repeats)]
    while len(repeated) % replicas:
        repeated += repeated[: replicas - len(repeated) % replicas]
    return repeated[rank::replicas][: size // 256 * 256 // replicas]


@settings(deadline=None)
@given(
    size=st.integers(256, 1100),
    replicas=RANKS,
    repeats=st.integers(1, 4),
    epoch=EPOCHS,
    shuffle=st.booleans(),
    data=st.data(),
)
def test_repeated_augmentation_is_upstreams(size, replicas, repeats, epoch, shuffle, data):
    rank = data.draw(st.integers(0, replicas - 1))
    sampler = set_to(RASampler(range(size), replicas, rank, shuffle, repeats), epoch)
    assert list(sampler) == repeated_by_definition(size, replicas, rank, repeats, epoch, shuffle)
    assert len(sampler) == size // 256 * 256 // replicas


@settings(deadline=None)
@given(size=st.integers(1, 255), replicas=RANKS, epoch=EPOCHS)
def test_repeated_augmentation_of_few_pictures_yields_some(size, replicas, epoch):
    parts = over_ranks(lambda rank: set_to(RASampler(range(size), replicas, rank), epoch), replicas)
    assert {len(part) for part in parts} == {max(1, size // replicas)}
    assert len(RASampler(range(size), replicas, 0)) == max(1, size // replicas)
    seen = list(chain(*parts))
    assert set(seen) <= set(range(size))
    assert len(set(seen)) == min(size, -(-len(seen) // 3))


def test_repeated_augmentation_is_of_one_process_unless_told():
    sampler = RASampler(range(300))
    assert (sampler.num_replicas, sampler.rank, sampler.num_repeats, len(sampler)) == (1, 0, 3, 256)
    assert list(sampler) == list(RASampler(range(300), 1, 0))
    assert list(sampler) != list(set_to(RASampler(range(300)), 1))


def test_repeated_augmentation_asks_torch_distributed(monkeypatch):
    monkeypatch.setattr("samplers.get_world_size", lambda: 4)
    monkeypatch.setattr("samplers.get_rank", lambda: 3)
    assert list(RASampler(range(300))) == list(RASampler(range(300), 4, 3))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ShardSampler([0], 2, 2), r"`rank` must lie in 0 \.\. num_replicas - 1 = 1, got 2"),
        (lambda: ShuffledSampler([0], 2, -1), "`rank`"),
        (lambda: RASampler([0], 1, 1), "`rank`"),
        (lambda: RASampler([0], num_repeats=0), "`num_repeats` must be at least 1, got 0"),
        (lambda: RASampler([]), "at least one picture"),
        (lambda: DrawBatches(ShuffledSampler([0]), 1, seed=0, rank=1), "`rank`"),
        (lambda: DrawBatches(ShuffledSampler([0]), 0, seed=0), "`batch_size` must be at least 1, got 0"),
        (
            lambda: DrawBatches(ShuffledSampler(range(9)), 2, seed=0).set_epoch(0, 5),
            r"`first_step` must lie in 0 \.\. steps_per_epoch = 4, got 5",
        ),
    ],
)
def test_arguments_that_cannot_be(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def draw_batches(size, batch_size, seed, replicas=1, rank=0) -> DrawBatches:
    sampler = ShuffledSampler(range(size), replicas, rank, seed=seed)
    return DrawBatches(sampler, batch_size, seed=seed, num_replicas=replicas, rank=rank)


@settings(deadline=None)
@given(size=st.integers(1, 120), batch_size=st.integers(1, 7), replicas=RANKS, seed=SEEDS, epoch=EPOCHS)
def test_each_step_of_all_ranks_is_a_step_of_one_process(size, batch_size, replicas, seed, epoch):
    alone = set_to(draw_batches(size, batch_size * replicas, seed), epoch)
    ranks = [set_to(draw_batches(size, batch_size, seed, replicas, rank), epoch) for rank in range(replicas)]
    assert alone.steps_per_epoch == len(alone) == size // (batch_size * replicas)
    steps = list(zip(*ranks, strict=True))
    assert len(steps) == len(ranks[0])
    for together, batch in zip(steps, alone, strict=True):
        assert sorted(chain(*together)) == sorted(batch)


@settings(deadline=None)
@given(size=st.integers(1, 120), batch_size=st.integers(1, 7), seed=SEEDS, epoch=EPOCHS, data=st.data())
def test_resuming_gives_the_rest_of_the_epoch(size, batch_size, seed, epoch, data):
    whole = list(set_to(draw_batches(size, batch_size, seed), epoch))
    resumed = draw_batches(size, batch_size, seed)
    first_step = data.draw(st.integers(0, resumed.steps_per_epoch))
    resumed.set_epoch(epoch, first_step)
    assert len(resumed) == len(whole) - first_step
    assert resumed.steps_per_epoch == len(whole)
    assert list(resumed) == whole[first_step:]
    resumed.set_epoch(epoch)
    assert list(resumed) == whole


def test_every_draw_has_a_seed_of_its_own():
    draws = [
        draw
        for seed in range(3)
        for epoch in range(3)
        for batch in set_to(draw_batches(40, 4, seed), epoch)
        for draw in batch
    ]
    assert all(isinstance(draw, Draw) for draw in draws)
    assert len({draw.seed for draw in draws}) == 3 * 3 * 40
    assert all(0 <= draw.seed < 2**63 for draw in draws)
    assert max(draw.seed for draw in draws) > 2**62


def test_repeats_of_a_picture_differ_in_their_seeds():
    batches = DrawBatches(RASampler(range(256)), 3, seed=0)
    first = next(iter(batches))
    assert len({draw.index for draw in first}) == 1
    assert len({draw.seed for draw in first}) == 3


def test_the_samplers_of_torch_will_do():
    batches = DrawBatches(DistributedSampler(range(10), 2, 1), 2, seed=0, num_replicas=2, rank=1)
    batches.set_epoch(3)
    assert batches.sampler.epoch == 3
    assert [len(batch) for batch in batches] == [2, 2]


class Noise:
    """Three random numbers, one of each generator, and the index; some indices cannot be read."""

    def __init__(self, size, broken=()):
        self.size, self.broken = size, frozenset(broken)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        numbers = torch.tensor([random.random(), np.random.random(), torch.rand(()).item()])
        return Unreadable(f"no {index}") if index in self.broken else (numbers, index)


def generator_states() -> tuple:
    arrays = np.random.get_state()
    return random.getstate(), arrays[1].tobytes(), arrays[2:], torch.get_rng_state().numpy().tobytes()


def epoch_of(pictures, workers, first_step=0) -> list[tuple]:
    batches = draw_batches(len(pictures), 4, seed=5)
    batches.set_epoch(2, first_step)
    loader = DataLoader(
        pictures,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate_readable,
        generator=torch.Generator(),  # else the loader itself draws from torch's
    )
    return [(images.tolist(), targets.tolist(), reasons) for images, targets, reasons in loader]


def test_workers_and_resuming_do_not_change_the_pictures_nor_the_generators():
    pictures = SeededPictures(Noise(22, broken=(3, 4, 11)))
    random.seed(1)
    np.random.seed(1)
    before = generator_states()
    alone = epoch_of(pictures, 0)
    assert generator_states() == before
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)
    assert epoch_of(pictures, 2) == alone
    assert epoch_of(pictures, 0, first_step=3) == alone[3:]
    assert [len(targets) for _, targets, _ in alone] == [4] * 5
    assert sum(len(reasons) for *_, reasons in alone) >= 1


@settings(deadline=None)
@given(seed=SEEDS, index=st.integers(0, 8))
def test_a_draw_decides_every_generator(seed, index):
    pictures = SeededPictures(Noise(9))
    assert len(pictures) == 9
    numbers, found = pictures[Draw(index, seed)]
    random.random()
    torch.rand(3)
    assert torch.equal(pictures[Draw(index, seed)][0], numbers)
    assert found == index
    assert not (pictures[Draw(index, seed ^ 1)][0] == numbers).any()
    assert not (pictures[Draw(index, seed ^ 2**62)][0] == numbers)[:2].any()  # torch takes the low 32 bits


def test_the_generators_are_put_back_after_an_error():
    before = generator_states()
    with pytest.raises(ZeroDivisionError):
        SeededPictures(type("Broken", (Noise,), {"__getitem__": lambda *_: 1 // 0})(3))[Draw(0, 1)]
    assert generator_states() == before


@settings(deadline=None)
@given(size=st.integers(2, 12), seed=SEEDS, data=st.data())
def test_another_picture_takes_the_place_of_one_that_cannot_be_read(size, seed, data):
    broken = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=min(size - 1, 8), unique=True))
    pictures = SeededPictures(Noise(size, broken))
    found = pictures[Draw(broken[0], seed)]
    assert isinstance(found, Replaced)  # of 8 others at most 7 are broken
    assert found.item[1] not in broken
    assert found.reasons[0] == f"no {broken[0]}"
    assert len(set(found.reasons)) == len(found.reasons)
    again = pictures[Draw(broken[0], seed)]
    assert (again.item[1], again.reasons) == (found.item[1], found.reasons)
    assert torch.equal(again.item[0], found.item[0])
    batch = collate_readable([found, Unreadable("x"), pictures[Draw(found.item[1], seed)]])
    assert batch.targets.tolist() == [found.item[1]] * 2
    assert batch.unreadable == [*found.reasons, "x"]


@pytest.mark.parametrize("size", [1, 5, 40])
def test_where_nothing_can_be_read_the_last_reason_remains(size):
    asked = []

    class Broken(Noise):
        def __getitem__(self, index):
            asked.append(index)
            return Unreadable(f"no {index}")

    found = SeededPictures(Broken(size))[Draw(0, 1)]
    assert len(asked) == len(set(asked)) == 1 + min(8, size - 1)
    assert found == Unreadable(f"no {asked[-1]}")
