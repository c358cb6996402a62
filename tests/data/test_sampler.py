from collections import Counter
from itertools import chain

from hypothesis import given, settings
from hypothesis import strategies as st

from dreambooth_lab.data.sampling.schedule import Bucket, Group, Schedule

buckets = st.lists(st.tuples(st.integers(1, 7), st.integers(0, 5)), min_size=1, max_size=4)


def build(counts, passes=1, batch_size=1, share=0.5, seed=0):
    made, first = [], 0
    for i, (instances, classes) in enumerate(counts):
        own = tuple(range(first, first + instances)), tuple(range(first + instances, first + instances + classes))
        rows = passes * instances
        groups = (Group(own[0], rows, False), Group(own[1], rows * share / (1 - share), True))
        made.append(Bucket((8, 8 * (i + 1)), tuple(group for group in groups if group.entries)))
        first += instances + classes
    return Schedule(made, batch_size, seed), made


def stream(schedule, batches):
    return list(chain.from_iterable(schedule.batch(n) for n in range(batches)))


@settings(deadline=None, max_examples=60)
@given(buckets, st.integers(1, 5), st.sampled_from([0.25, 0.5, 0.6]))
def test_all_images_are_used_equally_often(counts, batch_size, share):
    schedule, made = build(counts, batch_size=batch_size, share=share)
    epochs = 12 * batch_size
    batches = schedule._before(epochs)
    seen = Counter(row.entry for row in stream(schedule, batches))
    for bucket in made:
        instances = [seen[i] for i in bucket.instances]
        assert max(instances) - min(instances) <= 1
        assert abs(min(instances) - epochs) <= batch_size + 1
        if bucket.classes:
            classes = [seen[i] for i in bucket.classes]
            assert max(classes) - min(classes) <= 1
            assert abs(sum(classes) - sum(instances) * share / (1 - share)) <= 2 + batch_size


@settings(deadline=None, max_examples=40)
@given(buckets, st.integers(1, 5))
def test_first_epoch_covers_every_bucket(counts, batch_size):
    schedule, made = build(counts, batch_size=batch_size)
    seen = {row.entry for row in stream(schedule, schedule._before(1))}
    for bucket in made:
        assert seen & set(bucket.instances)


@settings(deadline=None, max_examples=40)
@given(buckets, st.integers(1, 4), st.integers(0, 60))
def test_batch_is_a_function_of_its_index(counts, batch_size, number):
    schedule, made = build(counts, batch_size=batch_size)
    rows = schedule.batch(number)
    fresh, _ = build(counts, batch_size=batch_size)
    assert rows == fresh.batch(number)
    assert len({next(b.shape for b in made if row.entry in b.instances + b.classes) for row in rows}) == 1
    assert [row.sample for row in rows] == list(range(number * batch_size, (number + 1) * batch_size))


def test_sample_n_is_independent_of_the_batch_size():
    streams = [stream(build([(5, 3)], batch_size=b)[0], 48 // b) for b in (1, 2, 4)]
    assert streams[0] == streams[1] == streams[2]


def test_batch_mixes_instance_and_class_rows_by_class_fraction():
    schedule, (bucket,) = build([(5, 6)], batch_size=4)
    for n in range(20):
        assert sum(row.entry in bucket.classes for row in schedule.batch(n)) == 2


def test_passes_and_seeds_have_different_orders():
    first = [row.entry for row in stream(build([(7, 0)])[0], 21)]
    passes = [tuple(first[i : i + 7]) for i in (0, 7, 14)]
    assert all(sorted(p) == list(range(7)) for p in passes) and len(set(passes)) > 1
    assert first != [row.entry for row in stream(build([(7, 0)], seed=1)[0], 21)]


rates = st.lists(st.tuples(st.integers(1, 6), st.sampled_from([0.25, 1, 2.5, 101])), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(rates, st.integers(1, 4), st.integers(0, 3))
def test_each_dataset_contributes_its_requested_rows(datasets, batch_size, seed):
    """Any number of datasets in a bucket: images of a dataset are used equally often, each dataset at its own rate."""
    first, groups = 0, []
    for n, rate in datasets:
        groups.append(Group(tuple(range(first, first + n)), n * rate, False))
        first += n
    schedule = Schedule([Bucket((8, 8), tuple(groups))], batch_size, seed)
    batches = schedule._before(4 * batch_size)
    seen = Counter(row.entry for row in stream(schedule, batches))
    for group in groups:
        counts = [seen[i] for i in group.entries]
        assert max(counts) - min(counts) <= 1
        expected = batches * batch_size * group.rows / sum(g.rows for g in groups)
        assert abs(sum(counts) - expected) <= len(groups) + 1


@settings(deadline=None, max_examples=30)
@given(rates, st.integers(2, 4))
def test_ranks_have_equal_numbers_of_rows(datasets, ranks):
    groups = tuple(Group(tuple(range(i * 10, i * 10 + n)), n * rate, False) for i, (n, rate) in enumerate(datasets))
    schedule = Schedule([Bucket((8, 8), groups)], 2 * ranks, 0)
    assert all(len(schedule.batch(n)[rank::ranks]) == 2 for n in range(5) for rank in range(ranks))


def test_bucket_of_one_image_fills_any_batch():
    """Batches are filled from an endless stream instead of padding: each image is used as often as it should be."""
    schedule, _ = build([(7, 0), (1, 0)], batch_size=4)
    seen = Counter(row.entry for row in stream(schedule, schedule._before(8)))
    assert set(seen) == set(range(8)) and set(seen.values()) == {8}
