"""Records of named tensors, indexed by row."""

from __future__ import annotations

import pytest
import torch

from dreambooth_lab.batch import Cond, Record, Text


def text(rows, tokens, start=1):
    """States, and a mask of ones for each of them."""
    states = torch.arange(start, start + rows * tokens * 2.0).view(rows, tokens, 2)
    return Text(states=states, pooled=states[:, 0], mask=torch.ones(rows, tokens, dtype=torch.long))


def same(a, b):
    return type(a) is type(b) and a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def test_select_indexes_every_tensor():
    whole = text(4, 3)
    some = whole.select(torch.tensor([2, 0]))
    assert type(some) is Text and some.rows == 2
    assert all(torch.equal(some[name], whole[name][[2, 0]]) for name in whole)
    assert whole.select(torch.tensor([], dtype=torch.long)).rows == 0


def test_single_row_is_repeated():
    one = text(1, 3)
    assert same(one.repeat(3), Text.stack([one, one, one]))


def test_replaced_rows_are_selected_back_and_others_unchanged():
    whole, other = Cond(text(4, 3), size=torch.arange(4.0)[:, None]), text(2, 3, start=100)
    rows = torch.tensor([3, 1])
    made = whole.replace_rows(rows, other)
    assert type(made) is Cond and torch.equal(made["size"], whole["size"]), "names that the other record lacks"
    assert all(torch.equal(made.select(rows)[name], other[name]) for name in other)
    rest = torch.tensor([0, 2])
    assert same(made.select(rest), whole.select(rest))
    assert torch.equal(whole["states"], text(4, 3)["states"]), "the record itself is unchanged"


def test_records_of_equal_shape_are_stacked_unchanged():
    made = Text.stack([text(1, 3), text(2, 3, start=50)])
    assert made.rows == 3 and same(made.select(torch.tensor([1, 2])), text(2, 3, start=50))


@pytest.mark.parametrize("kind", [torch.long, torch.int32, torch.bool, torch.float32])
def test_shorter_captions_are_padded_and_masked(kind):
    short, long = text(1, 2), text(2, 5, start=50)
    short["mask"], long["mask"] = short["mask"].to(kind), long["mask"].to(kind)
    made = Text.stack([short, long])
    assert made["states"].shape == (3, 5, 2) and made["mask"].dtype is kind and made["states"].dtype is torch.float32
    assert made["mask"].long().tolist() == [[1, 1, 0, 0, 0], [1] * 5, [1] * 5]
    assert torch.equal(made["states"][0, :2], short["states"][0]) and made["states"][0, 2:].abs().max() == 0
    assert same(made.select(torch.tensor([1, 2])), long)


@pytest.mark.parametrize(("there", "new"), [(5, 2), (2, 5)])
def test_shorter_and_longer_texts_are_replaced_with_their_masks(there, new):
    whole, other = text(3, there), text(1, new, start=70)
    made = whole.replace_rows(torch.tensor([1]), other)
    assert made["states"].shape == (3, 5, 2) and made["mask"].dtype is torch.long
    assert made["mask"].sum(1).tolist() == [there, new, there]
    assert torch.equal(made["states"][1, :new], other["states"][0]) and made["states"][1, new:].abs().sum() == 0
    assert torch.equal(made["states"][0, :there], whole["states"][0]) and made["states"][0, there:].abs().sum() == 0


def test_padding_is_at_the_end_of_all_dimensions_but_the_first():
    made = Record.stack([Record(a=torch.ones(1, 2, 1)), Record(a=torch.ones(2, 1, 3))])
    assert made["a"].tolist() == [[[1, 0, 0], [1, 0, 0]], [[1, 1, 1], [0, 0, 0]], [[1, 1, 1], [0, 0, 0]]]


def test_gradients_flow_into_replaced_rows():
    learned = text(1, 2)
    learned["states"].requires_grad_()
    text(3, 2).replace_rows(torch.tensor([1]), learned)["states"].sum().backward()
    assert torch.equal(learned["states"].grad, torch.ones(1, 2, 2))
