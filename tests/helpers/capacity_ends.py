"""What ``capacity.result`` of the workers gave, held against another's."""

import torch


def assert_same(one, other):
    """They chose alike, and trained alike but for rounding."""
    assert one["ranks"] == other["ranks"]
    assert [row[:3] for row in one["history"]] == [row[:3] for row in other["history"]]
    assert one["history"]
    assert one["adapter"].keys() == other["adapter"].keys()
    for key, value in one["adapter"].items():
        assert (value - other["adapter"][key]).norm() <= 1e-5 * value.norm()


def assert_same_average(one, other):
    """The averages that followed them are the same but for rounding."""
    assert one["average"].keys() == other["average"].keys() == one["adapter"].keys()
    for key, value in one["average"].items():
        assert value.shape == one["adapter"][key].shape
        torch.testing.assert_close(other["average"][key], value, rtol=1e-5, atol=1e-6)


def assert_bit_for_bit(one, other):
    """They are of processes of one training, or of one training in one piece and in two."""
    assert one["history"] == other["history"]
    assert one["history"]
    assert one["adapter"].keys() == other["adapter"].keys()
    assert all(torch.equal(value, other["adapter"][key]) for key, value in one["adapter"].items())


def assert_resumed(whole, stop):
    """``whole`` has in "resumed" what a checkpoint after step ``stop`` came to, with a change of ranks before
    and after that."""
    steps = [row[0] for row in whole["history"]]
    assert steps[0] <= stop < steps[-1]
    assert_bit_for_bit(whole["resumed"], whole)
