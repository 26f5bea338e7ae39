"""What of a stored weight is one matrix to a rule, and who owns it."""
import pytest
import torch

from optim.adamw import AdamW
from optim.blocks import Cut, cut_for
from optim.groups import Group, GroupError, assign
from optim.muon import Muon
from optim.plan import owned_counts, plan_banks


def counting(*shape):
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def test_heads_of_q_are_rows_and_heads_of_attn_out_are_columns():
    q, out = counting(2, 12, 4), counting(2, 4, 12)
    by_head = cut_for("heads", "q", heads=3, tied=False).take(q)
    assert by_head.shape == (6, 4, 4) and torch.equal(by_head[4], q[1, 4:8])
    by_head = cut_for("heads", "attn_out", heads=3, tied=False).take(out)
    assert by_head.shape == (6, 4, 4) and torch.equal(by_head[4], out[1, :, 4:8])
    pairs = cut_for("head_pairs", "k", heads=6, tied=False)
    assert pairs.take(q).shape == (6, 4, 4) and pairs.shape((12, 4)) == (4, 4)


@pytest.mark.parametrize("cut", [Cut(), Cut(rows=3), Cut(cols=2), Cut(transposed=True)], ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 4), (0, 6, 4)], ids=str)
def test_what_is_done_to_the_blocks_is_done_to_the_weights(cut, shape):
    stack = counting(*shape)
    blocks = cut.take(stack)
    assert blocks.shape == (shape[0] * cut.blocks, *cut.shape(shape[1:]))
    blocks.mul_(2)
    cut.put(stack, blocks)
    assert torch.equal(stack, 2 * counting(*shape))


def test_only_a_cut_along_columns_copies():
    stack = counting(2, 6, 4)
    for cut, shares in ((Cut(), True), (Cut(rows=3), True), (Cut(transposed=True), True), (Cut(cols=2), False)):
        assert (cut.take(stack).untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()) == shares


def test_an_untied_embedding_is_the_map_from_one_hot_tokens():
    assert cut_for("whole", "embed", heads=2, tied=False).shape((50304, 768)) == (768, 50304)
    assert cut_for("whole", "pos", heads=2, tied=True).shape((1024, 768)) == (768, 1024)
    assert cut_for("whole", "embed", heads=2, tied=True).shape((50304, 768)) == (50304, 768)
    assert cut_for("whole", "head", heads=2, tied=False).shape((50304, 768)) == (50304, 768)


def test_vectors_and_scalars_are_one_column():
    assert Cut().take(counting(3, 5)).shape == (3, 5, 1) and Cut().take(counting(3)).shape == (3, 1, 1)
    assert Cut().shape((5,)) == (5, 1) and Cut().shape(()) == (1, 1)


@pytest.mark.parametrize("blocks, role, heads, words", [("heads", "mlp_in", 2, "not for mlp_in"),
                                                        ("head_pairs", "q", 3, "even number of heads, not 3")])
def test_impossible_blocks_are_refused(blocks, role, heads, words):
    params = {"w": torch.empty(12, 12, device="meta")}
    group = Group(name="hidden", params=("rest",), rule="muon", hyper=Muon(), blocks=blocks)
    with pytest.raises(GroupError, match=words):
        plan_banks((group,), {"hidden": ["w"]}, params, {"w": role}, heads, False, 1)


def test_owners_are_chosen_by_cost_and_not_by_count():
    """GPT-2 small on 8 ranks: 48 square matrices cost 1 each, 24 of the MLP cost 3; 15 units are everyone's share."""
    counts = owned_counts([(48, 1.0), (12, 3.0), (12, 3.0)], 8)
    assert [sum(kind) for kind in counts] == [48, 12, 12]
    assert {sum(cost * kind[rank] for kind, cost in zip(counts, (1, 3, 3))) for rank in range(8)} == {15}
    assert owned_counts([(1, 100.0), (6, 10.0)], 2) == [[1, 0], [0, 6]]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 7, 8])
def test_no_rank_has_more_than_a_matrix_too_many(world):
    shapes = {"q": (768, 768), "attn_out": (768, 768), "mlp_in": (3072, 768), "mlp_out": (768, 3072)}
    params = {f"{role}{i}": torch.empty(s, device="meta") for i in range(11) for role, s in shapes.items()}
    roles = {name: name.rstrip("0123456789") for name in params}
    group = Group(name="hidden", params=("rest",), rule="muon", hyper=Muon())
    assignment = assign((group,), roles, {name: tuple(p.shape) for name, p in params.items()})
    banks = plan_banks((group,), assignment, params, roles, 6, False, world)
    cost = {bank.shape: Muon().flops(*bank.shape) for bank in banks}
    load = [sum(cost[b.shape] * (b.offsets[r + 1] - b.offsets[r]) for b in banks) for r in range(world)]
    assert max(load) - min(load) <= max(cost.values())
    assert all(b.offsets[-1] == len(b.names) == len(b.owners) for b in banks)


def test_an_elementwise_bank_is_cut_evenly_and_padded():
    params = {"a": torch.empty(5, device="meta"), "b": torch.empty(3, 4, device="meta")}
    group = Group(name="rest", params=("rest",), rule="adamw", hyper=AdamW())
    (bank,) = plan_banks((group,), {"rest": ["a", "b"]}, params, {"a": "gain", "b": "head"}, 1, False, 3)
    assert bank.shape is None and bank.offsets == (0, 32, 64, 96)
