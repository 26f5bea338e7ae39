"""The benches: their arithmetic exactly, and tiny real runs whose tables add up. No test here looks at a clock."""
import ast
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from scipy import stats

from harness.load import load
from scripts.bench import __main__ as bench
from scripts.bench.breakdown import Timeline, marked_forward, peak, peak_bytes, table, train, union
from scripts.bench.interleave import interleave, ratio, verdict
from scripts.bench.optimizer import LONG_RUN, refreshes_due
from scripts.bench.report import BenchError, header
from scripts.bench.step import largest
from scripts.bench.training import TrainingStep, make_optimizer
from tests.conftest import ROOT

CPU = torch.device("cpu")


def run(capsys, *arguments) -> tuple[int, list[str], list[str]]:
    """(exit code, lines of stdout, lines of stderr) of the package, in this process."""
    capsys.readouterr()
    try:
        code = bench.main([str(word) for word in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


# ---------------------------------------------------------------- turns and ratios

def test_sides_take_turns_forwards_and_backwards_and_the_first_round_does_not_count():
    called = []
    sides = [lambda: called.append("A") or len(called), lambda: called.append("B") or len(called)]
    assert interleave(sides, 4) == [[3, 6, 7, 10], [4, 5, 8, 9]]
    assert "".join(called) == "AB" + "ABBAABBA"


@pytest.mark.parametrize("shift, rounds", [(0.0, 2), (0.0, 10), (0.02, 10), (0.5, 3), (-0.1, 30)])
def test_the_interval_is_that_of_scipy_s_t_test_on_the_logs(shift, rounds):
    g = torch.Generator().manual_seed(rounds)
    b = torch.rand(rounds, generator=g, dtype=torch.float64) + 1
    a = b * torch.exp(shift + 0.02 * torch.randn(rounds, generator=g, dtype=torch.float64))
    found = ratio(a.tolist(), b.tolist())
    test = stats.ttest_1samp((a / b).log().numpy(), 0.0)
    low, high = test.confidence_interval(0.95)
    assert [math.log(x) for x in found[:3]] == pytest.approx([(a / b).log().mean().item(), low, high], rel=1e-9)
    assert found.differs == (test.pvalue < 0.05)


def test_a_ratio_of_lists_that_are_not_paired_is_refused():
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("a, b, called, warned", [
    ([1.10, 1.11, 1.09], [1, 1, 1], "A faster than B by", False), ([0.90, 0.91, 0.89], [1, 1, 1], "A slower", False),
    ([1.01, 0.99, 1.00], [1, 1, 1], "no difference shown", False), ([1.3, 0.8, 1.1], [1, 1, 1], "no diff", True),
    ([2.0, 2.2, 2.5], [1, 1, 1], "A faster", True)])
def test_a_difference_is_called_only_where_the_interval_leaves_one_out(a, b, called, warned):
    lines = verdict(ratio(a, b))
    assert lines[0].startswith(called) and any(line.startswith("warning") for line in lines) == warned


# ---------------------------------------------------------------- the largest micro-batch

@pytest.mark.parametrize("start", [1, 5, 64, 100])
def test_the_largest_that_fits_is_found_and_no_size_is_tried_twice(start):
    for capacity in range(0, 130):
        tried = []
        found = largest(lambda n: tried.append(n) or n <= capacity, start, 100)
        assert found == min(capacity, 100) and len(set(tried)) == len(tried) <= 16 and set(tried) <= set(range(1, 101))


def out_of_memory_above(step: TrainingStep, rows: int) -> list[int]:
    """Let the step's forward pass fail for more than `rows` rows; the list of those that it was given."""
    forward, given = step.forward, []

    def fail_above(inputs, targets):
        given.append(len(inputs))
        if len(inputs) > rows:
            raise torch.OutOfMemoryError("as a GPU says it")
        return forward(inputs, targets)
    step.forward = fail_above
    return given


def test_a_micro_batch_that_does_not_fit_is_halved_until_it_does(tiny):
    step = TrainingStep(load(str(tiny)).config, CPU)
    given = out_of_memory_above(step, 2)
    step.settle()
    assert step.micro_rows == 2 and given[:3] == [8, 4, 2] and [len(x) for x, _ in step.batch()] == [2, 2, 2, 2]


def test_one_row_that_does_not_fit_is_refused(tiny):
    step = TrainingStep(load(str(tiny)).config, CPU)
    out_of_memory_above(step, 0)
    with pytest.raises(BenchError, match="out of memory with one row of 32 tokens"):
        step.settle()


def test_gradients_from_before_an_out_of_memory_are_forgotten(tiny):
    step = TrainingStep(load(str(tiny), ["micro_batch_tokens=96"]).config, CPU)      # 3 + 3 + 2 rows

    def fail(*_):
        raise torch.OutOfMemoryError
    step.forward = first_then(step.forward, 1, fail)
    assert not step.fits() and all(p.grad is None for p in step.model.parameters())


def test_gradients_taken_by_a_step_without_memory_are_forgotten(tiny, monkeypatch):
    step = TrainingStep(load(str(tiny)).config, CPU)

    def fail(*_):
        assert len(step.optimizer.sent) > 1
        raise torch.OutOfMemoryError
    monkeypatch.setattr(step.optimizer, "_send_gradients", first_then(step.optimizer._send_gradients, 2, fail))
    assert not step.fits() and not step.optimizer.sent


def first_then(work, times: int, other):
    """`work` for so many calls, then `other`."""
    calls = []
    return lambda *given: calls.append(1) or (work if len(calls) <= times else other)(*given)


# ---------------------------------------------------------------- where the time goes

def test_the_bench_makes_model_and_optimizer_as_train_py_does():
    def calls(path):
        found = [node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Call)]
        return {name: [ast.unparse(node) for node in found if ast.unparse(node.func) == name] for name in (
            "GPT", "Optimizer", "preflight.check", "processes.activation_dtype")}
    assert calls("scripts/bench/training.py") == calls("train.py")


def test_marks_stand_where_the_parts_meet_and_change_neither_loss_nor_gradients(tiny):
    cfg = load(str(tiny), [f"model.init.{role}={{form: normal, scale: 0.1}}" for role in ("attn_out", "mlp_out", "head")
                           ]).config                                  # not zeros, which hide whatever is in between
    plain, step, timeline = TrainingStep(cfg, CPU), TrainingStep(cfg, CPU), Timeline(CPU)
    step.forward = marked_forward(step.model, timeline, compiled=False)
    assert torch.equal(plain.backward(plain.batch()), step.backward(step.batch()))
    for p, q in zip(plain.model.parameters(), step.model.parameters()):
        assert p.grad.norm() > 0 and torch.equal(p.grad, q.grad)
    block = ["attention", "rest", "MLP", "rest"]
    forward = ["rest", *block * 2, "head", "rest"]
    names = {"embedding, norms, rest": "rest", "head and loss": "head"}
    passed = [(names.get(part, part), which) for (part, which), _ in timeline.marks]
    assert passed == [(part, "forward") for part in forward] + [(part, "backward") for part in [
        "head", "rest", *["MLP", "rest", "attention", "rest"] * 2]]


def test_seconds_belong_to_the_part_that_the_mark_before_them_opened():
    timeline = Timeline(CPU)
    timeline.marks = [(("a", ""), 1.0), (("b", ""), 1.5), (("a", ""), 3.5), (("end", ""), 4.0)]
    assert timeline.totals() == {("a", ""): 1.0, ("b", ""): 2.0}


def test_every_step_is_measured_whole_and_reads_the_next_batch(tiny):
    step, timeline = TrainingStep(load(str(tiny)).config, CPU), Timeline(CPU)
    step.note = lambda part: timeline.enter((part, ""))
    train(step, 3, timeline)
    parts = [part for (part, _), _ in timeline.marks]
    assert parts.count("data") == parts.count("optimizer") == 3 and parts[0] == "data" and parts[-1] == "end"
    assert step.step == 4                                             # and one that did not count


@pytest.mark.parametrize("intervals, length", [([], 0), ([(0, 2), (5, 6)], 3), ([(0, 9), (1, 2), (8, 12)], 12),
                                               ([(5, 6), (0, 5)], 6)])
def test_time_with_two_kernels_at_once_counts_once(intervals, length):
    assert union(intervals) == length


def test_the_peak_is_the_most_held_at_any_time():
    assert peak([(3, -5), (1, 5), (2, 3), (4, 4), (5, -7)]) == 8 and peak([]) == 0


def numbers(line: str) -> list[float]:
    return [float(word.replace(",", "")) for word in re.findall(r"-?\d[\d,]*\.?\d*", line[24:])]


def assert_adds_up(lines: list[str]) -> None:
    """The table's passes sum to its parts, its parts to the sum, and that with the remainder to the whole."""
    rows = {line[:24].strip(): numbers(line) for line in lines if line.endswith(" %")}
    parts = [rows[name] for name in ("attention", "MLP", "head and loss", "embedding, norms, rest")]
    for forward, backward, both, _ in parts:
        assert forward + backward == pytest.approx(both, abs=0.011) and backward > 0
    others = [rows[name][0] for name in ("optimizer", "data: wait, copy", "loop (host)")]
    assert sum(row[2] for row in parts) + sum(others) == pytest.approx(rows["sum"][0], abs=0.05)
    assert rows["sum"][0] + rows["remainder"][0] == pytest.approx(rows["step with marks"][0], abs=0.02)
    assert abs(rows["remainder"][0]) < 0.2 * rows["step with marks"][0]


def test_a_table_states_what_its_parts_leave_over():
    lines = table({("attention", "forward"): 0.001, ("attention", "backward"): 0.003, ("optimizer", ""): 0.002}, 0.008)
    rows = {line[:24].strip(): numbers(line) for line in lines[1:]}
    assert rows["attention"] == [1, 3, 4, 50] and rows["optimizer"] == [2, 25] and rows["MLP"] == [0, 0, 0, 0]
    assert rows["sum"] == [6, 75] and rows["remainder"] == [2, 25] and rows["step with marks"] == [8, 100]


def test_the_breakdown_of_a_real_step_adds_up(tiny):
    words = ["step", "--config", tiny, "--breakdown", "--steps", "3", "micro_batch_tokens=128"]
    done = subprocess.run([sys.executable, "-m", "scripts.bench", *words], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert_adds_up(lines)
    assert "1 thread, torch" in lines[0] and lines[1].endswith("--breakdown --steps 3 micro_batch_tokens=128")
    assert "micro-batches of 128 tokens, float32, eager; tokens: " in lines[2] and "train_*.bin" in lines[2]
    found = {line[:44].strip(): line[44:] for line in lines}
    at_peak, at_rest = numbers(" " * 24 + found["peak memory, tensors"])
    assert at_peak > at_rest > 0 and "tokens/s" in found["step without marks"]
    assert {"model FLOP/s (6N + 12LHQT a token)", "MFU against a product of 1024 x 1024"} <= found.keys()


def test_memory_at_the_peak_grows_with_the_micro_batch_and_at_rest_does_not(tiny):
    def memory(*overrides):
        step = TrainingStep(load(str(tiny), ["batch_tokens=2048", *overrides]).config, CPU)
        step.settle()
        return peak_bytes(step, step.batch())
    (rest, whole), (same, parts) = memory(), memory("micro_batch_tokens=256")
    numel = sum(p.numel() for p in TrainingStep(load(str(tiny)).config, CPU).model.parameters())
    assert whole - rest > 3 * (parts - rest) > 0 and rest == same and 8 * numel <= rest <= 12.1 * numel


# ---------------------------------------------------------------- sub-commands

def test_a_step_beside_the_plain_one_keeps_the_readme_s_form(tiny, capsys):
    code, lines, _ = run(capsys, "step", "--config", tiny, "--rounds", "2", "--steps", "1")
    assert code == 0 and "2 rounds of 1 steps of 256 tokens" in lines[0] and len(lines) == 5
    assert re.fullmatch(r"tiny {26} +[\d.]+ ms/step +[\d,]+ tokens/s", lines[2])
    assert re.fullmatch(r"plain eager float32 \+ AdamW {3}  +[\d.]+ ms/step +[\d,]+ tokens/s", lines[3])
    assert re.fullmatch(r"ratio {25} +[\d.]+ x  \(rounds [\d.]+ to [\d.]+\)", lines[4])


def test_without_shards_tokens_are_random_and_fill_the_configuration_s_order(tiny):
    step = TrainingStep(load(str(tiny), ["data.train=none/*.bin", "data.order=2025-01"]).config, CPU)
    (inputs, targets), = step.batch()
    assert inputs.shape == (8, 32) and torch.equal(inputs[:, 1:], targets[:, :-1]) and step.tokens.startswith("random")
    assert 0 <= inputs.min() and inputs.max() < 64 and len(inputs.unique()) > 50


def test_two_configurations_are_compared_by_tokens_a_second(tiny, capsys):
    code, lines, _ = run(capsys, "compare", tiny, "--rounds", "3", "--against", tiny, "batch_tokens=128", "--steps=1")
    assert code == 0 and lines[2].startswith(f"A  {tiny}") and lines[3].startswith(f"B  {tiny} batch_tokens=128")
    for line, tokens in ((lines[2], 256), (lines[3], 128)):
        ms, speed = re.search(r"([\d.]+) ms/step +([\d,]+) tokens/s", line).groups()
        assert float(speed.replace(",", "")) == pytest.approx(1e3 * tokens / float(ms), rel=0.01)
    mean, low, high = map(float, re.search(r"([\d.]+) x  \(95 % interval ([\d.]+) to ([\d.]+)\)", lines[4]).groups())
    assert low <= mean <= high and lines[5].startswith("no difference" if low <= 1 <= high else "A ")


def test_the_optimizer_step_of_each_rule_is_a_share_of_a_training_step(tiny, capsys):
    code, lines, _ = run(capsys, "optimizer", "--config", tiny, "--rounds", "1", "--rules", "soap", "muonclip", "muon")
    passes = numbers(" " * 24 + lines[2].split(":")[1])[0]
    rows = {line.split()[0]: numbers(f"{'':10}{line}") for line in lines[4:]}
    assert code == 0 and rows.keys() == {"soap", "muonclip", "muon"}
    for ms, share in rows.values():
        assert share == pytest.approx(100 * ms / (ms + passes), abs=0.2)


def test_a_ratio_above_one_says_that_a_makes_more_tokens_a_second(tiny, capsys, monkeypatch):
    def as_long_as_any_other(work, times, device):
        work()
        return 0.5
    monkeypatch.setattr("scripts.bench.interleave.seconds", as_long_as_any_other)
    code, lines, _ = run(capsys, "compare", tiny, "--against", tiny, "batch_tokens=128", "--rounds", "2")
    assert code == 0 and lines[4].split("A over B")[1].split() == "2.000 x (95 % interval 2.000 to 2.000)".split()
    assert lines[5].split() == "A faster than B by 100.00 %".split()


@pytest.mark.parametrize("rule, overrides, due", [("splus", ["inverse_every=25"], 1 / 25), ("muon", [], 0),
                                                  ("soap", ["precondition_frequency=1"], 1)])
def test_refreshes_are_counted_over_all_of_a_group_s_matrices(tiny, rule, overrides, due):
    cfg = load(str(ROOT / f"configs/demo/{rule}.yaml"), [f"optim.hidden.{word}" for word in overrides]).config
    tiny_cfg = load(str(tiny)).config
    cfg = replace(tiny_cfg, optim=(replace(tiny_cfg.optim[0], rule=rule, hyper=cfg.optim[0].hyper), tiny_cfg.optim[1]))
    optimizer = make_optimizer(cfg, TrainingStep(tiny_cfg, CPU).model, False)
    banks = [bank for bank in optimizer.banks if not bank.flat]
    counted = [sum(refreshes_due(bank, at, optimizer.count["hidden"]) for bank in banks) for at in LONG_RUN]
    assert counted == [sum(cfg.optim[0].hyper.refresh_due(at, i, 12) for i in range(12)) for at in LONG_RUN]
    assert len(banks) > 1 and sum(counted) == 12 * len(LONG_RUN) * due


def test_every_output_names_what_produced_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "step", "data.train=a b"])
    first, second = header(CPU, "more").splitlines()
    assert re.search(r"\w, \d+ threads?, torch [\d.]+\S*, (triton [\d.]+, )?\d{4}-\d\d-\d\d, more$", first)
    assert second == "python -m scripts.bench step 'data.train=a b'"


# ---------------------------------------------------------------- asking wrongly

def test_help_lists_every_sub_command_and_loads_nothing(capsys):
    code = ("import sys; from scripts.bench import __main__ as bench\n"
            "for words in ([], ['--help'], ['step', '--help'], ['compare', '-h'], ['optimizer', '--help'],\n"
            "              ['nothing'], ['step', '--rounds', 'x']):\n"
            "    try: bench.main(words)\n"
            "    except SystemExit: pass\n"
            "print('loaded:', *{'torch', 'scipy', 'pydantic', 'triton'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("loaded:\n") and done.stdout.count("usage:") == 3, done.stdout + done.stderr
    _, lines, _ = run(capsys, "--help")
    listed = {line.split()[0] for line in lines[2:]}
    programs = {path.stem for path in (ROOT / "scripts/bench").glob("*.py") if "\ndef main(" in path.read_text()}
    assert listed | {"__main__"} == programs | {"__main__"} and {"step", "optimizer", "compare"} < listed
    assert all(len(line.split()) > 3 for line in lines[2:])


@pytest.mark.parametrize("words, said", [
    (["stop"], "no sub-command 'stop': take one of step, "),
    (["absent"], "this checkout has no scripts/bench/absent.py"),
    (["step", "--config", "nothing.yaml"], "nothing.yaml"),
    (["step", "seq_len"], "override seq_len: expected key=value"),
    (["step", "batch_token=4"], "batch_token"),
    (["step", "--rounds", "0"], "argument --rounds: '0' is not a whole number from 1 on"),
    (["step", "--breakdown", "--largest-micro-batch"], "not allowed with argument"),
    (["step", "--memory-gib", "24"], "only with --largest-micro-batch"),
    (["compare", "demo.yaml"], "--against B.yaml"),
    (["compare", "demo.yaml", "--against", "seed=1"], "B has no configuration"),
    (["compare", "demo.yaml", "--against", "demo.yaml", "--rounds", "1"], "from 2 on"),
    (["optimizer", "--rules", "moun"], "no rule 'moun'"),
    (["optimizer", "--config", "gpt2.yaml"], "no optim group is named hidden")])
def test_a_mistake_is_one_line_and_exit_code_two(words, said, capsys, monkeypatch):
    monkeypatch.setitem(bench.SUBCOMMANDS, "absent", "a file that a partial checkout lacks")
    code, out, err = run(capsys, *words)
    assert code == 2 and not out and len(err) == 1 and err[0].startswith("error: ") and said in err[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cpu_has_no_largest_micro_batch(tiny, capsys):
    code, out, err = run(capsys, "step", "--config", tiny, "--largest-micro-batch")
    assert code == 2 and not out and len(err) == 1 and "needs a GPU" in err[0]


@pytest.mark.parametrize("rank, lines", [("0", 1), ("1", 0)])
def test_several_ranks_are_refused_by_the_first(rank, lines, tiny, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("RANK", rank)
    code, out, err = run(capsys, "step", "--config", tiny)
    assert code == 2 and not out and len(err) == lines and all("one process, not 2" in line for line in err)


def test_what_is_no_refusal_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr("scripts.bench.step.main", lambda arguments: int("no number"))
    with pytest.raises(ValueError, match="invalid literal"):
        bench.main(["step"])


# ---------------------------------------------------------------- what only a GPU can show

@pytest.mark.gpu
def test_the_breakdown_of_a_step_on_a_gpu_adds_up(tiny, capsys):
    code, lines, _ = run(capsys, "step", "--config", tiny, "--breakdown", "--steps", "3", "batch_tokens=2048",
                         "precision=bfloat16")
    assert code == 0 and any("GPU waits for the host" in line for line in lines)
    assert_adds_up(lines)


@pytest.mark.gpu
def test_the_largest_micro_batch_leaves_the_rest_of_the_memory_alone(tiny, capsys):
    code, lines, _ = run(capsys, "step", "--config", tiny, "--largest-micro-batch", "--memory-gib", "0.1",
                         "batch_tokens=1048576", "compile=false", "--rounds", "1")
    assert code == 0 and numbers(lines[3])[0] <= 0.1 and 0 < numbers(lines[2])[0] < 1048576
