"""Layer ranges: both directions, and every way in which one can be wrong."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselora_dist.config import ConfigError, compact_ranges, expand_ranges
from sparselora_dist.config.ranges import resolve_ranges

SPARSITIES = st.one_of(st.sampled_from([0.0, 0.5, 0.75, 0.99]), st.floats(min_value=0, max_value=1, exclude_max=True))


@given(st.dictionaries(st.integers(0, 120), SPARSITIES))
def test_round_trip(layers: dict[int, float]) -> None:
    ranges = compact_ranges(layers)
    assert expand_ranges(ranges) == layers
    assert compact_ranges(expand_ranges(ranges)) == ranges
    assert len(ranges) == len(set(layers.values()))


def test_published_ranges() -> None:
    attention = [*range(14, 20), *range(21, 24), *range(25, 30)]
    assert compact_ranges(dict.fromkeys(attention, 0.75)) == {"14-19,21-23,25-29": 0.75}
    assert compact_ranges({**dict.fromkeys(range(3, 31), 0.99), 1: 0.5}) == {"1": 0.5, "3-30": 0.99}
    assert compact_ranges({}) == {} and expand_ranges({}) == {}
    assert expand_ranges({"7": 0.1, "1 - 2".replace(" ", ""): 0.2, "4, 5": 0.3}) == {
        1: 0.2,
        2: 0.2,
        4: 0.3,
        5: 0.3,
        7: 0.1,
    }


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ({"7-3": 0.9}, "range '7-3' is reversed: write '3-7'"),
        ({"1,9-8": 0.9}, "range '9-8' is reversed"),
        ({"3-30": 0.9, "5": 0.5}, "ranges '3-30' and '5' both name layer 5"),
        ({"3-5,5-7": 0.9}, "ranges '3-5' and '5-7' both name layer 5"),
        ({"0-999999": 0.9, "999999": 0.1}, "both name layer 999999"),
        ({"5": 0.9, "05": 0.5}, "both name layer 5"),
        *[
            ({key: 0.9}, "expected layer numbers such as")
            for key in ("", "a", "1-", "-1", "1,,2", "1-2-3", "3..5", "1.5")
        ],
        *[({key: 0.9}, "expected layer numbers such as") for key in ("../0", "layers.3", "*", "1234567", "٣")],
        *[({"3-30": value}, "range '3-30' has the sparsity") for value in (-0.1, 1.0, 1, float("nan"), float("inf"))],
        *[({"3-30": value}, "allowed: a number in \\[0, 1\\)") for value in (True, False, "0.9", None, [0.9])],
    ],
)
def test_refused(ranges: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"'sparse_lora.layers.ffn'.*{words}"):
        expand_ranges(ranges, "sparse_lora.layers.ffn")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("40-50", "range '40-50' matches nothing: the model has layers 0-31"),
        ("32", "range '32' matches nothing: the model has layers 0-31"),
        ("30-32", "range '30-32' reaches beyond the last layer: the model has layers 0-31"),
        ("1-2,40", r"range '40' \(in '1-2,40'\) matches nothing: the model has layers 0-31"),
    ],
)
def test_a_range_that_the_model_does_not_have(key: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^'sparse_lora.layers.ffn' {words}$"):
        resolve_ranges({key: 0.9}, 32, "sparse_lora.layers.ffn")
    assert resolve_ranges({"31": 0.9}, 32, "x") == {31: 0.9}
