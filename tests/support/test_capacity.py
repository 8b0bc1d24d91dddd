"""How much an adapter can hold, beside its data."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from increlora_rs.support.capacity import Capacity, Data, data_of, labels, tokens_of

MRPC = Counter({"1": 2474, "0": 1194})


def test_an_adapter_holds_two_bits_a_number() -> None:
    assert Capacity(84_480).bits == 168_960
    assert str(Capacity(84_480)) == "84,480 trained parameters can hold some 169 kbit"


def test_labels_hold_their_entropy() -> None:
    assert labels({"a": 4, "b": 4}) == Data(8.0, "8 labels")
    assert labels({"a": 1, "b": 1}, rows=10) == Data(10.0, "10 labels")
    assert labels({"a": 9}).bits == 0.0
    p = 2474 / 3668
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert labels(MRPC).bits == pytest.approx(3668 * entropy)


def test_the_line_says_what_follows() -> None:
    plenty = str(Capacity(84_480, labels(MRPC)))
    assert "3,668 labels some 3.34 kbit (51 times less): rank is plentiful" in plenty
    short = str(Capacity(5_000, tokens_of(1_000_000)))
    assert "1,000,000 tokens some 1 Mbit (1e+02 times more): rank is short" in short
    assert "rank is not short" in str(Capacity(1000, Data(1000.0, "the data")))


def test_labels_of_one_value_hold_nothing_and_divide_by_nothing() -> None:
    assert "rank is plentiful" in str(Capacity(10, labels({"a": 9})))


@pytest.mark.parametrize("name", ["labels", "label", "label_ids"])
@pytest.mark.parametrize("wrap", [int, float, torch.tensor])
def test_a_label_a_row(name: str, wrap: object) -> None:
    rows = [{"input_ids": [1, 2, 3], name: wrap(k % 4)} for k in range(400)]  # type: ignore[operator]
    assert data_of(rows) == Data(pytest.approx(800.0), "400 labels")


def test_labels_by_token_count_where_the_loss_does() -> None:
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 7, 8]}] * 10
    assert data_of(rows) == Data(20.0, "20 tokens")


def test_tokens_alone_are_a_language_model_s() -> None:
    assert data_of([{"input_ids": torch.arange(8)}] * 5) == Data(40.0, "40 tokens")


def test_of_many_rows_a_part_is_looked_at() -> None:
    class Rows:
        seen = 0

        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, place: int) -> dict[str, int]:
            self.seen += 1
            return {"labels": place % 2}

    rows = Rows()
    found = data_of(rows)
    assert found is not None and found.told == "1,000,000 labels"
    assert found.bits == pytest.approx(1e6, rel=0.01)
    assert rows.seen <= 1000


def test_a_data_set_of_datasets_with_torch_s_format() -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2]] * 8, "labels": [0, 1] * 4}).with_format("torch")
    assert data_of(rows) == Data(pytest.approx(8.0), "8 labels")


@pytest.mark.parametrize(
    "unknown", [None, iter([{"labels": 1}]), [], [(1, 2)], [{"text": "a"}], [{"labels": "a"}], {}]
)
def test_of_other_data_nothing_is_known(unknown: object) -> None:
    assert data_of(unknown) is None


def test_bits_can_be_given() -> None:
    assert data_of(5_000_000) == Data(5e6, "the data")
    with pytest.raises(ValueError, match="data=-1"):
        data_of(-1)
