import numpy
from hypothesis import given
from hypothesis import strategies as st

from stages.core.batches import length_batches, pad, token_batches
from stages.core.tensors import shuffled_batches

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=80)


@given(lengths, st.integers(1, 16))
def test_length_batches_hold_every_index_once_in_order_of_length(lengths: list[int], size: int) -> None:
    batches = length_batches(lengths, size)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths)
    assert all(len(batch) == size for batch in batches[:-1])


@given(lengths, st.integers(1, 200))
def test_token_batches_keep_their_budget_and_could_hold_no_more(lengths: list[int], tokens: int) -> None:
    batches = token_batches(lengths, tokens)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths)
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        assert len(batch) == 1 or len(batch) * lengths[batch[-1]] <= tokens
        assert following is None or (len(batch) + 1) * lengths[following[0]] > tokens


@given(lengths, st.integers(1, 16), st.integers(0, 9))
def test_shuffled_batches_hold_every_index_once_and_repeat_for_a_seed(lengths: list[int], size: int, seed: int) -> None:
    batches = shuffled_batches(lengths, size, seed)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert batches == shuffled_batches(lengths, size, seed)


def test_shuffled_batches_differ_between_seeds_and_waste_little() -> None:
    lengths = [1 + index % 30 for index in range(600)]
    one, other = shuffled_batches(lengths, 10, 0), shuffled_batches(lengths, 10, 1)
    assert one != other
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in one)
    assert padded < 1.15 * sum(lengths)


def test_pad_fills_the_right_and_masks_it() -> None:
    ids, mask = pad([[5, 6, 7], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == numpy.int64


def test_pad_to_a_length_and_of_empty_rows() -> None:
    assert pad([[5]], 0, length=4)[0].tolist() == [[5, 0, 0, 0]]
    assert pad([[]], 0)[1].tolist() == [[0]]
