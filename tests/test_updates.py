"""How updates are rounded and added: bits that depend on nothing but the numbers."""

import pytest
import torch
from counting import Counts

from easyedit_nmke.models import updates
from easyedit_nmke.models.updates import Dense, LowRank, Sparse, accumulate, fingerprint


def some(k=1, rows=5, columns=7, seed=0, layer=0):
    g = torch.Generator().manual_seed(seed)
    return LowRank(layer, torch.randn(rows, k, generator=g), torch.randn(k, columns, generator=g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_fingerprint_sees_every_bit(dtype):
    tensor = torch.randn(37, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = fingerprint({0: tensor})
    assert fingerprint({0: tensor.clone()}) == before
    for index in (0, 200, 406):
        changed = tensor.clone().view(-1)
        changed[index] = (
            torch.nextafter(changed[index].float(), torch.tensor(1e9)).to(dtype) if dtype == torch.float32 else -changed[index]
        )
        assert fingerprint({0: changed.view_as(tensor)}) != before
    swapped = tensor.clone().view(-1)
    swapped[[3, 4]] = swapped[[4, 3]]
    assert fingerprint({0: swapped.view_as(tensor)}) != before


def test_a_fingerprint_spans_chunks(monkeypatch):
    tensor = torch.arange(1000, dtype=torch.float32)
    monkeypatch.setattr(updates, "_CHUNK", 64)
    before = fingerprint({0: tensor})
    tensor[999] += 1
    assert fingerprint({0: tensor}) != before


def test_a_fingerprint_is_what_it_was_for_states_on_disk():
    generator = torch.Generator().manual_seed(3)
    some = {"a": torch.randn(37, 11, generator=generator), "b": torch.randn(300, 5, generator=generator).bfloat16()}
    assert {name: fingerprint({name: tensor}) for name, tensor in some.items()} == {
        "a": 2036460034327437559,
        "b": 4106624137523082260,
    }
    assert fingerprint({}) == 0


def test_a_fingerprint_draws_once_for_a_device_and_waits_once(monkeypatch):
    monkeypatch.setattr(updates, "_CHUNK", 96)
    tensors = {i: torch.ones(1000 * (i + 1)) for i in range(3)}
    with Counts() as first:
        digest = fingerprint(tensors)
    drawn, randint = [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: drawn.append(args) or randint(*args, **kwargs))
    with Counts() as second:
        assert fingerprint(tensors) == digest
    chunks = sum(-(-500 * (i + 1) // 96) for i in range(3))
    assert not drawn and first.waits["rest"] == second.waits["rest"] == 1
    assert second.launches["rest"] == 2 * chunks + 1


def test_a_column_of_an_update_is_two_launches_a_block(monkeypatch):
    """And blocks of a GPU are so large that a matrix [4096, 14336] is 15 of them."""
    assert -(-4096 // updates.block_rows(14336, cuda=True)) == 15
    monkeypatch.setattr(updates, "_BLOCK", 7 * 31)
    start, counted = torch.zeros(63, 31), []
    for columns in (1, 20):
        with Counts() as counts:
            accumulate(torch.zeros(63, 31), start, [some(columns, 63, 31)])
        counted.append(counts.launches["rest"])
    assert counted[1] - counted[0] == 9 * 2 * 19


def test_edits_that_follow_one_another_are_added_together(monkeypatch):
    """Which on a GPU is one launch a block, however many edits."""
    plain, columns = LowRank.added_to, []

    def counted(update, total, rows):
        columns.append(update.left.shape[1])
        plain(update, total, rows)

    monkeypatch.setattr(LowRank, "added_to", counted)
    sparse = Sparse("w", torch.tensor([0]), torch.ones(1))
    accumulate(torch.zeros(63, 31), torch.zeros(63, 31), [some(1, 63, 31), some(2, 63, 31), sparse, some(3, 63, 31)])
    assert columns == [3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_sums_are_the_same_bits_in_any_blocks_and_batches(dtype, transposed, monkeypatch):
    start = torch.randn(63, 31, generator=torch.Generator().manual_seed(1)).to(dtype)
    start = start.T.contiguous().T if transposed else start
    several = [some(k, 63, 31, k).rounded(dtype) for k in (1, 3, 2)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = start.to(wide).clone()
    for update in several:
        for i in range(update.left.shape[1]):
            expected += torch.outer(update.left[:, i].to(wide), update.right[i].to(wide))
    found = start.clone()
    accumulate(found, start, several)
    assert torch.equal(found, expected.to(dtype))
    monkeypatch.setattr(updates, "_BLOCK", 100)
    once = torch.zeros_like(start)
    accumulate(once, start, several)
    assert torch.equal(once, found)
    if dtype != torch.bfloat16:  # one at a time, in place; 16-bit weights have masters for that
        for update in several:
            accumulate(start, start, [update])
        assert torch.equal(start, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_directions_of_16_bit_weights_are_16_bit_and_scaled(dtype):
    update = some(2)._replace(right=torch.tensor([[1e-9, -2e-9, 0.0, 3e-11], [3.0, 7e4, -0.0, 1.0]]))
    rounded = update.rounded(dtype)
    assert rounded.right.dtype == dtype and rounded.left.dtype == torch.float32
    assert rounded.right.abs().amax(1).tolist() == [1.0, 1.0] and not torch.signbit(rounded.right[1, 2])
    exact, found = update.left @ update.right, rounded.left @ rounded.right.float()
    assert torch.allclose(found, exact, rtol=0, atol=2 * torch.finfo(dtype).eps * exact.abs().max().item())
    assert torch.equal(some().rounded(torch.float32).right, some().right)
    assert not some()._replace(right=torch.zeros(1, 7)).rounded(dtype).right.any()


def test_columns_of_single_requests_are_taken_out():
    update = some(3)._replace(first=4)
    assert update.without({1, 9}) is update
    left = update.without({5})
    assert torch.equal(left.left, update.left[:, [0, 2]]) and torch.equal(left.right, update.right[[0, 2]])
    assert update.without({4, 5, 6}) is None


def mixed(rows=9, columns=7):
    """Updates of the three kinds, of one matrix, and the differences that they make."""
    g = torch.Generator().manual_seed(3)
    places = torch.randperm(rows * columns, generator=g)[:11].sort().values
    values = torch.randn(11, generator=g)
    dense = torch.randn(rows, columns, generator=g)
    low = some(2, rows, columns)
    whole = torch.zeros(rows * columns).index_copy(0, places, values).view(rows, columns)
    return [Sparse("w", places, values), low._replace(parameter="w"), Dense("w", dense)], [whole, low.left @ low.right, dense]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_sparse_and_dense_updates_are_added_in_order_in_any_blocks(dtype, transposed, monkeypatch):
    made, differences = mixed()
    made = [update.rounded(dtype) for update in made]
    start = torch.randn(9, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    start = start.T.contiguous().T if transposed else start
    found = torch.empty_like(start)
    accumulate(found, start, made)
    for size in (1, 14, 1000):
        monkeypatch.setattr(updates, "_BLOCK", size)
        again = torch.empty_like(start)
        accumulate(again, start, made)
        assert torch.equal(found, again)
    assert torch.allclose(found.float(), start.float() + sum(differences), atol=1e-5 if dtype == torch.float32 else 0.1)


def test_a_vector_is_changed_too():
    bias = torch.arange(5.0)
    accumulate(bias, bias, [Dense("b", torch.ones(5)), Sparse("b", torch.tensor([1, 4]), torch.tensor([10.0, 20.0]))])
    assert bias.tolist() == [1, 12, 3, 4, 25]


def test_a_sparse_or_dense_update_is_taken_out_as_a_whole():
    for update in (Sparse("w", torch.tensor([1]), torch.ones(1), first=2, requests=2), Dense("w", torch.ones(2, 2), 2, 2)):
        assert update.without({0, 2}) is update and update.without({2, 3, 9}) is None


def test_indices_must_increase():
    with pytest.raises(ValueError, match="a sparse update of w needs a value for each of its indices, which must increase"):
        Sparse("w", torch.tensor([3, 3]), torch.ones(2)).rounded(torch.float32)
