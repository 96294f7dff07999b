import pytest

from feature_store.cells import split_by_size


@pytest.mark.parametrize(
    ("sizes", "limit", "most", "bounds"),
    [
        ([1, 1, 1, 1, 1], 2, 9, [0, 2, 4, 5]),
        ([1, 1, 1, 1, 1], 9, 3, [0, 3, 5]),
        ([5, 1, 7, 0], 3, 9, [0, 1, 2, 3, 4]),
        ([0, 0, 3], 3, 9, [0, 3]),
        ([4, 4, 4, 30, 1, 1, 1, 1, 0], 10, 3, [0, 2, 3, 4, 7, 9]),
    ],
)
def test_ranges_hold_no_more_than_the_limit_and_one_size_at_least(sizes, limit, most, bounds):
    assert split_by_size(sizes, limit=limit, most=most) == bounds
