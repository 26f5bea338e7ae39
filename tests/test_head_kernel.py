"""The head's loss in Triton: interpreted on a CPU against float64, compiled for every architecture, raced on a GPU."""
import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F

from model.config import ModelConfig, Softcap
from model.gpt import GPT
from model.head import LossError, cap, check_loss, head_loss
from tests.aot import CAPABILITIES, SHARED_BYTES, resources
from tests.interpreted import interpreter

SOFTCAPS = {"none": None, "tanh": Softcap("tanh", 15.0), "sigmoid": Softcap("sigmoid", 23.0, 7.5, 5.0),
            "isru": Softcap("isru", 15.0)}
ROUNDED = {f"{form}_before_cast": Softcap(s.form, s.cap, s.scale, s.shift, True) for form, s in SOFTCAPS.items() if s}
BOTH = SOFTCAPS | ROUNDED
SMALL = {"vocab_size": 61, "padded_vocab_size": 64, "layers": 1, "heads": 2, "width": 32, "tied": False,
         "softcap": SOFTCAPS["tanh"]}


@pytest.fixture(scope="module")
def interpreted():
    with interpreter() as run:
        yield run


def some_logits(rows, columns, dtype, device="cpu", width=8.0):
    generator = torch.Generator().manual_seed(rows * columns)
    targets = torch.randint(columns - 3, (rows,), generator=generator)
    return (width * torch.randn(rows, columns, generator=generator)).to(device, dtype), targets.to(device)


def by_torch(z, targets, columns, softcap):
    """Losses and dz of torch's form, in its own types."""
    z = z.detach().requires_grad_()
    y = z.float() if softcap is None else cap(z, softcap).float() if softcap.before_cast else cap(z.float(), softcap)
    losses = F.cross_entropy(y[:, :columns], targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), z)[0]


def by_kernel(z, targets, columns, softcap, write=True, clone=True):
    from model.cross_entropy import in_numbers, losses_of
    z = z.clone(memory_format=torch.preserve_format) if clone else z    # processes share the memory of tensors
    return losses_of(z, targets, columns, *in_numbers(softcap), write), z


def errors(z, targets, columns, softcap):
    """Largest errors of losses and dz against float64: of the kernel, and of torch's form."""
    from model.cross_entropy import reference
    exact = reference(z, targets, columns, softcap)
    torchs = by_torch(z, targets, columns, softcap)
    return [[(a.double() - b).abs().max().item() for a, b in zip(got, exact)]
            for got in (by_kernel(z, targets, columns, softcap), torchs)]


def no_worse(kernel, torchs, dtype):
    """Errors of losses near 40 and of gradients near 1 differ by a last bit or two: of float32, and of their type."""
    slack = 5e-6, max(2e-7, torch.finfo(dtype).eps / 8)
    return all(ours <= 1.25 * theirs + s for ours, theirs, s in zip(kernel, torchs, slack))


# ------------------------------------------------------------ interpreted

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", BOTH)
def test_losses_and_gradients_are_no_further_from_float64_than_torchs(interpreted, form, dtype):
    for rows, columns in ((1, 257), (3, 1000), (7, 5), (2, 512)):
        kernel, torchs = interpreted(errors, *some_logits(rows, columns, dtype), columns, BOTH[form])
        assert no_worse(kernel, torchs, dtype), (rows, columns)
        assert kernel[0] < (2e-2 if dtype == torch.float16 and form in ROUNDED else 5e-6), (rows, columns)


@pytest.mark.parametrize("form", ROUNDED)
def test_a_cap_before_the_cast_rounds_as_torchs_does(interpreted, form):
    z, targets = some_logits(40, 257, torch.float16)
    losses, _ = interpreted(by_kernel, z, targets, 257, ROUNDED[form])
    rounded, exact = (by_torch(z, targets, 257, caps[form.removesuffix(end)])[0]
                      for caps, end in ((ROUNDED, ""), (SOFTCAPS, "_before_cast")))
    assert (losses - rounded).abs().mean() < 0.1 * (losses - exact).abs().mean()


def test_padding_has_no_share_and_a_gradient_of_zero(interpreted):
    z, targets = some_logits(3, 300, torch.float32)
    z[:, 257:] = 1e4
    losses, dz = interpreted(by_kernel, z, targets % 257, 257, SOFTCAPS["tanh"])
    expected = by_torch(z[:, :257], targets % 257, 257, SOFTCAPS["tanh"])
    torch.testing.assert_close((losses, dz[:, :257]), expected)
    assert not dz[:, 257:].any()


def in_a_wider_tensor(z, targets, columns):
    wide = torch.full((len(z), 2 * columns + 1), torch.nan, dtype=z.dtype)
    wide[:, 3:columns + 3] = z
    losses, dz = by_kernel(wide[:, 3:columns + 3], targets, columns, None, clone=False)
    return losses, dz.clone(), wide[:, :3].isnan().all() and wide[:, columns + 3:].isnan().all()


def test_rows_may_lie_apart_and_nothing_else_is_written(interpreted):
    z, targets = some_logits(5, 300, torch.float16)
    *results, untouched = interpreted(in_a_wider_tensor, z, targets, 300)
    assert untouched
    torch.testing.assert_close(tuple(results), by_torch(z, targets, 300, None))
    with pytest.raises(ValueError, match="must lie side by side, not 5 apart"):
        interpreted(by_kernel, torch.zeros(300, 5).T, targets, 300, None)


def test_the_loss_alone_leaves_the_logits_alone(interpreted):
    z, targets = some_logits(4, 300, torch.float32)
    losses, after = interpreted(by_kernel, z, targets, 300, SOFTCAPS["isru"], False)
    torch.testing.assert_close(losses, by_torch(z, targets, 300, SOFTCAPS["isru"])[0])
    assert torch.equal(after, z)


def test_extreme_logits_and_wrong_targets_never_pass_for_losses(interpreted):
    z = torch.tensor([[80.0, -80.0, 0.0], [-3e38, 3e38, 1.0], [-torch.inf, 2.0, 1.0], [torch.nan, 0.0, 0.0],
                      [torch.inf, 0.0, 0.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    losses, dz = interpreted(by_kernel, z, torch.tensor([1, 1, 2, 1, 1, 3, -1]), 3, None)
    torch.testing.assert_close(losses[:3], torch.tensor([160.0, 0.0, 1.3132617]))
    assert dz[:3].isfinite().all() and losses[3:].isnan().all()


def far_rows():
    z = torch.empty(2**31 + 300, dtype=torch.float16).as_strided((3, 300), (2**30, 1))      # touched in three places
    values, targets = some_logits(3, 300, torch.float16)
    z.copy_(values)
    losses, dz = by_kernel(z, targets, 300, None, clone=False)
    return losses, dz.clone()


def test_rows_beyond_two_to_the_31_numbers_are_reached():
    with interpreter() as run:                          # of its own: a wrong address kills the process
        results = run(far_rows)
    values, targets = some_logits(3, 300, torch.float16)
    torch.testing.assert_close(results, by_torch(values, targets, 300, None))


# ------------------------------------------------------------ inside of torch

def operator_checks(bias, wanted):
    from model.cross_entropy import in_numbers, loss_and_dz
    x, weight = torch.randn(5, 8, requires_grad=wanted), torch.randn(300, 8, requires_grad=wanted)
    bias = torch.randn(300, requires_grad=wanted) if bias else None
    return torch.library.opcheck(loss_and_dz, (x, weight, bias, torch.randint(257, (5,)), 257,
                                               *in_numbers(SOFTCAPS["tanh"]), wanted))


@pytest.mark.parametrize("bias, wanted", [(True, True), (False, True), (False, False)])
def test_the_operator_is_what_it_says_to_torch(interpreted, bias, wanted):
    assert set(interpreted(operator_checks, bias, wanted).values()) == {"SUCCESS"}


def loss_and_gradients(config, backend, dtype, device="cpu"):
    """Loss of training, its gradients by name, and the loss without gradients, of a model with drawn weights."""
    torch._dynamo.reset()
    model = GPT(ModelConfig(**config), 16, dtype).to(device)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.5))
    tokens = torch.randint(61, (2, 16), generator=generator).to(device)
    run = torch.compile(model, dynamic=False, fullgraph=True, backend=backend) if backend else model
    loss = run(tokens, tokens.roll(1))
    (loss / 32).backward()
    with torch.no_grad():
        alone = run(tokens, tokens.roll(1))
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, alone


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("parts", [{}, {"tied": True, "softcap": None}, {"biases": False, "loss_over_padding": False}],
                         ids=str)
def test_a_model_has_the_same_losses_and_gradients_with_it(interpreted, parts, backend):
    config = SMALL | parts
    for dtype, tolerances in ((torch.float32, {}), (torch.float16, {"rtol": 1e-3, "atol": 1e-4})):
        expected = loss_and_gradients(config, None, dtype)              # torch's form
        got = interpreted(loss_and_gradients, config | {"loss": "triton"}, backend, dtype)
        torch.testing.assert_close(got, expected, **tolerances)


def kept_bytes(loss):
    """Bytes a logit that the head keeps for its backward pass, in tensors of the logits' size."""
    config = ModelConfig(vocab_size=1000, layers=1, heads=1, width=2, softcap=SOFTCAPS["tanh"], loss=loss)
    x, weight = torch.randn(1, 10, 2, dtype=torch.float16, requires_grad=True), torch.randn(1000, 2, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
        head_loss(x, weight, None, torch.zeros(1, 10, dtype=torch.int64), config)
    return sum(t.element_size() for t in kept.values() if t.numel() == 10 * 1000)


def test_two_bytes_a_logit_are_kept_where_torch_keeps_eight(interpreted):
    assert interpreted(kept_bytes, "triton") == 2
    assert kept_bytes("torch") == 8


def test_a_cpu_is_refused_in_one_line():
    model = GPT(ModelConfig(**SMALL | {"loss": "triton"}), 16)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(LossError, match="^loss: triton needs a GPU, and the logits are on the cpu; set model.loss="):
        model(tokens, tokens)
    check_loss(ModelConfig(**SMALL), torch.device("cpu"))
    with pytest.raises(LossError, match="^model.loss: triton .* this is a cpu; set model.loss=torch$"):
        check_loss(model.config, torch.device("cpu"))


@pytest.mark.parametrize("capability, refused", [((7, 5), "is below 8.0"), ((8, 0), None), ((12, 0), None)])
def test_a_gpu_without_bfloat16_or_a_missing_triton_is_refused(monkeypatch, capability, refused):
    config, gpu = ModelConfig(**SMALL | {"loss": "triton"}), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(LossError, match=refused) if refused else contextlib.nullcontext():
        check_loss(config, gpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LossError, match="Triton is not installed; set model.loss=torch"):
        check_loss(config, gpu)


def test_a_device_takes_the_row_of_the_newest_architecture_that_it_reaches(monkeypatch):
    from model.cross_entropy import CONFIGURATIONS, INTERPRETED, configuration_of
    for capability, row in {(8, 9): 80, (9, 0): 90, (10, 3): 100, (11, 0): 100, (12, 1): 120}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert configuration_of(torch.device("cuda")) == CONFIGURATIONS[row]
    assert configuration_of(torch.device("cpu")) == INTERPRETED


# ------------------------------------------------------------ compiled ahead of time

@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_configuration_compiles_within_the_architectures_means(capability):
    import triton.language as tl

    from model.cross_entropy import CONFIGURATIONS, in_numbers, row_kernel
    block, warps = CONFIGURATIONS[capability]
    pointers, numbers = ("z_ptr", "target_ptr", "loss_ptr"), ("row_stride", "columns", "padded")
    cases = [*itertools.product(("bf16",), BOTH.values(), (True, False), (numbers,)),
             *itertools.product(("fp32",), SOFTCAPS.values(), (True, False), (numbers,)),
             *itertools.product(("bf16", "fp32"), (None, SOFTCAPS["tanh"]), (True,),
                                ((), ("row_stride", "padded")))]        # 50,257 columns, alone and in rows of 50,304
    for dtype, softcap, write, aligned in cases:
        types = {"z_ptr": f"*{dtype}", "target_ptr": "*i64", "loss_ptr": "*fp32", **dict.fromkeys(numbers, "i32"),
                 **dict.fromkeys(("c", "scale", "shift"), "fp32")}
        form, *_, before_cast = in_numbers(softcap)
        constexprs = {"FORM": form, "TYPE": tl.bfloat16 if before_cast else tl.float32, "WRITE": write, "BLOCK": block}
        registers, shared, spilled = resources(row_kernel, types, constexprs, capability, warps,
                                               aligned=pointers + aligned)
        assert spilled == 0 and shared <= SHARED_BYTES[capability], (dtype, softcap, write, aligned)
        assert registers * 32 * warps <= 65536 // 2                         # two rows at a time on a multiprocessor


# ------------------------------------------------------------ on a GPU

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", BOTH)
def test_a_gpu_is_no_further_from_float64_than_torch_is_there(form, dtype):
    for columns in (50304, 50257):
        assert no_worse(*errors(*some_logits(64, columns, dtype, "cuda"), columns, BOTH[form]), dtype), columns


@pytest.mark.gpu
def test_a_gpu_reaches_rows_beyond_two_to_the_31_numbers():
    z = torch.zeros(43_000, 50_304, dtype=torch.bfloat16, device="cuda")
    values, targets = some_logits(43_000, 3, torch.bfloat16, "cuda")
    targets[:] = 1
    z[:, :3] = values
    losses, dz = by_kernel(z, targets, 50_304, None, clone=False)
    for rows in (slice(8), slice(-8, None)):
        again = F.pad(values[rows], (0, 50_301))
        torch.testing.assert_close((losses[rows], dz[rows]), by_torch(again, targets[rows], 50_304, None))


@pytest.mark.gpu
def test_a_compiled_model_on_a_gpu_trains_the_same_with_it():
    expected, got = (loss_and_gradients(SMALL | {"loss": loss}, "inductor", torch.bfloat16, "cuda")
                     for loss in ("torch", "triton"))
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-3)


@pytest.mark.gpu
def test_less_memory_is_used_than_compiled_torch_uses():
    from scripts.bench.head import Head
    peaks = {form: Head(form, 4096, torch.device("cuda")).peak_bytes() for form in ("compiled", "triton")}
    assert peaks["triton"] < 0.75 * peaks["compiled"], peaks
