"""Track 1's presets are the published records: steps, order of tokens, schedules, groups, counts, learning rates."""
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import TrainLoader, row_range, steps_in
from data.shards import write_shard
from harness.load import load
from harness.preflight import table_of
from model.gpt import GPT
from scripts import records
from tests.conftest import ROOT, train_here
from tests.test_record_mathematics import COMPARISON, ORDER, RECORD
from tests.transcriptions import track1
from tests.transcriptions.loader import places_by_rank

PRESETS = {**RECORD, **dict.fromkeys(COMPARISON, 7)}
HIDDEN = {"q", "k", "v", "attn_out", "mlp_in", "mlp_out"}
LAYERS = 12 * 768 * 768 * 12                     # q, k, v, attn_out and two of 768 x 3072 in each of 12 layers
SPECTRAL = {"hidden": 1, "mlp_in": 2}            # Muon's shape factor from record 8 on: √(rows/cols) where above 1
RMS1 = {"hidden": 768 ** 0.5, "mlp_in": 3072 ** 0.5, "mlp_out": 3072 ** 0.5}      # records 4 to 7: √max(rows, cols)


def config_of(preset: str):
    return load(f"records/{preset}.yaml").config


@pytest.fixture(scope="module")
def tables():
    """Preset -> (configuration, rows of the parameter table), at full size."""
    found = {}
    for preset in PRESETS:
        config = config_of(preset)
        with torch.device("meta"):
            model = GPT(config.model, config.seq_len)
        found[preset] = config, table_of(config, model)
    return found


# ---------------------------------------------------------------- the files

def test_every_file_in_the_folders_is_one_of_these_presets():
    assert {str(p.path.relative_to(records.FOLDER))[:-5] for p in records.presets()} == PRESETS.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_prints_itself_and_opens_with_its_command(preset, capsys):
    assert train_here("--config", f"records/{preset}.yaml", "--print-config") == 0
    printed, path = capsys.readouterr().out, records.FOLDER / f"{preset}.yaml"
    assert f"steps: {config_of(preset).steps} " in printed and "# parameters: one update" in printed
    lines = path.read_text().splitlines()
    assert (path.parent / lines[0].partition("$schema=")[2]).resolve() == ROOT / "configs" / "schema.json"
    assert lines[1] == f"# torchrun --standalone --nproc_per_node=8 train.py --config records/{preset}.yaml"


def test_the_page_of_records_is_what_the_presets_say():
    assert records.PAGE.read_text(encoding="utf-8") == records.page(), "run python -m scripts.records"


@pytest.mark.parametrize("damage, message", [(("# data: 33", "# date: 33"), "no line `# data: ...`"),
                                             (("at step 6200", "at 6200"), "published: expected `LOSS at step N")])
def test_a_header_that_does_not_say_enough_is_refused(damage, message, tmp_path):
    (tmp_path / "x.yaml").write_text((records.FOLDER / "04-muon.yaml").read_text().replace(*damage))
    with pytest.raises(ValueError, match=message):
        records.read(tmp_path / "x.yaml")


def test_published_numbers_are_those_of_the_published_curves():
    curves = [json.loads(path.read_text()) for path in (records.FOLDER / "curves").glob("*.json")]
    for preset in records.presets():
        name = load(str(preset.path)).config.name
        curve, = (curve for curve in curves if name in curve["presets"])
        assert Path(preset.source.split()[0]).name in curve["source"], name
        p, step = preset.published, curve["steps"][-1]
        assert (int(p["step"]), p["loss"]) == (step, f"{curve['val_loss'][-1]:.4f}"), name
        assert p["first"] == f"{curve['val_loss'][0]:.4f}", name
        amount, unit = p["time"].split()
        assert math.isclose(float(amount) * {"min": 60, "s": 1}[unit], step * float(p["ms"]) / 1000, rel_tol=.016), name


def test_a_run_has_the_records_steps_batch_and_validation(tables):
    for preset, (config, _) in tables.items():
        published, record = records.read(records.FOLDER / f"{preset}.yaml").published, PRESETS[preset]
        ladder = preset.startswith("2024-11-06")
        assert config.steps == int(published["step"]) == (3200 if ladder else track1.STEPS[record][0])
        assert (config.batch_tokens, config.seq_len, config.val_tokens) == (524_288, 1024, 10 * 2 ** 20)
        assert config.val_every == {1: 250, 2: 128}.get(record, 125)
        assert config.grad_clip == (track1.CLIP if record == 1 else None) and config.average is None


def test_the_ladder_ends_at_record_9_and_every_rung_adds_one_thing():
    rungs = [config_of(preset) for preset in PRESETS if preset.startswith("2024-11-06")]
    nine = config_of("09-shortcuts")
    assert replace(rungs[-1], name=nine.name) == nine and len(rungs) == 6
    parts = [{**{k: v for k, v in vars(rung.model).items()}, "momentum": rung.optim[0].scheduled} for rung in rungs]
    changed = [[key for key in before if before[key] != after[key]] for before, after in zip(parts, parts[1:])]
    assert changed == [["value_residual"], ["value_residual"], ["embed_shortcut"], ["momentum"], ["softcap"]]


def test_a_network_has_the_records_parts():
    """Also those that twenty steps do not tell apart: norms of queries and keys commute with rotations."""
    for preset, record in PRESETS.items():
        m = config_of(preset).model
        assert (m.layers, m.width, m.heads, m.head_width) == ((12, 768, 12, 64) if record < 5 else (12, 768, 6, 128))
        assert (m.vocab_size, m.vocab_rows) == (50257, 50257 if record in (2, 4) else 50304)
        assert m.positions == ("learned" if record == 1 else "rotary") and m.loss_over_padding == (record > 1)
        assert record == 1 or (m.rotary, m.rotary_base, m.norm) == ("full", 1e4, "rmsnorm")
        assert m.norm_gain == m.biases == (record == 1)
        assert m.norm_eps == (1e-6 if record in (2, 4) else None)
        assert m.qk_norm == ("none" if record < 5 else "after_rotary" if record == 5 else "before_rotary")
        assert m.activation == ("gelu_tanh" if record == 1 else "gelu" if record < 5 else "relu2")
        assert math.isclose(m.attn_branch_scale, 24 ** -.5 if record in (2, 4) else 1, rel_tol=1e-15)
        assert (m.tied, m.embed_norm) == (record < 8, record >= 8) and m.unet == (record >= 11)
        assert m.value_residual == ("none" if record < 8.1 else "fixed" if record == 8.1 else "learned")
        assert m.embed_shortcut == (record >= 8.3) and (m.softcap is not None) == (record >= 9)
        assert m.attn_scale is m.window is None
        assert record < 9 or (m.softcap.form, m.softcap.cap, m.softcap.before_cast) == ("tanh", 30, True)


# ---------------------------------------------------------------- the order of tokens

@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """(paths, counts): a token is its own position in all shards in a row."""
    folder, counts, first = tmp_path_factory.mktemp("order"), [256 * 6 + 17, 256 * 5, 256 * 9 + 130, 256 * 4 + 1], 0
    for number, count in enumerate(counts):
        write_shard(folder / f"{number}.bin", np.arange(first, first + count))
        first += count
    return sorted(folder.glob("*.bin")), counts


def test_a_preset_reads_in_its_records_order():
    for preset, record in PRESETS.items():
        assert config_of(preset).data.order == ORDER.get(record, "2024-10"), preset


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("order", ["continuous", "2024-06", "2024-10"])
def test_tokens_come_in_the_published_order_at_any_number_of_ranks(order, world, shards):
    (paths, counts), seq, batch, steps = shards, 16, 256, 60
    firsts = np.cumsum([0, *counts])
    if order == "continuous":
        starts = [[(step * 8 + rank) * (batch // 8) for rank in range(8)] for step in range(steps)]
    else:
        places = places_by_rank(order, counts, batch, steps)
        starts = [[firsts[shard] + place for shard, place in ranks] for ranks in places]
        assert (starts[0] == starts[1]) == (order == "2024-10")      # the first batch twice
        assert max(len({shard for shard, _ in ranks}) for ranks in places) > 1      # ranks drift apart
    loader = TrainLoader(paths, order, seq, 65536, repeat=True)
    for step in range(steps):
        rows = [row for rank in range(world) for row in range(*row_range(batch // seq, rank, world))]
        read = [loader.rows(step, step * batch, batch, row, row + 1) for row in rows]           # a row a micro-batch
        expected = np.concatenate([np.arange(start, start + batch // 8) for start in starts[step]])
        assert np.array_equal(np.concatenate([inputs.ravel() for inputs, _ in read]), expected % firsts[-1]), step
        assert np.array_equal(np.concatenate([targets.ravel() for _, targets in read]), (expected + 1) % firsts[-1])


def test_a_preset_says_how_many_shards_its_order_takes(tables):
    for preset in records.presets():
        config = tables[str(preset.path.relative_to(records.FOLDER))[:-5]][0]
        enough = next(n for n in range(1, 200) if steps_in(config.data.order, np.full(n, 10 ** 8), 524_288, 1024)
                      >= config.steps)
        assert preset.data == f"{enough} shards of FineWeb-10B"


# ---------------------------------------------------------------- schedules

@pytest.mark.parametrize("preset", PRESETS)
def test_schedules_are_those_of_the_description(preset):
    config, record, rule = config_of(preset), PRESETS[preset], COMPARISON.get(preset)
    steps, warmup, warmdown = track1.STEPS[record if not preset.endswith("baseline") else 8.1]
    warmup = track1.WARMUP_OF_COMPARISON[rule] if rule else warmup
    turns = (0, 1, warmup - 1, warmup, warmup + 1, steps // 2, steps - (warmdown or 0), steps - 1)
    for s in sorted({max(0, turn + near) for turn in turns for near in (-1, 0, 1)} - {steps, steps + 1}):
        for group in config.optim:
            found = (group.schedule or config.schedule).at(s, config.steps)
            assert abs(found - track1.eta(record, s, steps, warmup, warmdown)) < 1e-12, (s, group.name)
            for key, schedule in group.scheduled.items():
                assert (group.name, key) == ("hidden", "momentum")
                assert abs(schedule.at(s, config.steps) - track1.momentum(record, s, track1.MOMENTUM_RAMP)) < 1e-12
    assert ("momentum" in config.optim[0].scheduled) == (record >= 8.4)


def test_schedules_pass_through_the_published_points():
    def lr(preset, s, group=0):
        config = config_of(preset)
        return config.optim[group].hyper.lr * config.schedule.at(s, config.steps)

    assert float(f"{lr('01-llmc', 0):.2g}") == 8.6e-7 and float(f"{lr('01-llmc', 9999):.3g}") == 3.07e-4     # its log
    assert lr("02-adamw", 0) == .0018 / 256 and lr("02-adamw", 7488) == .0018 and lr("02-adamw", 8512) == .0009
    assert lr("04-muon", 0) == .00036 and math.isclose(lr("04-muon", 6199), .00036 / 1800)
    assert math.isclose(lr("11-unet", 2550), .02) and math.isclose(lr("11-unet", 2550, group=2), .004)
    momentum = config_of("11-unet").optim[0].scheduled["momentum"]
    assert [round(momentum.at(s, 3000), 6) for s in (0, 250, 500, 2999)] == [.85, .9, .95, .95]


# ---------------------------------------------------------------- groups

def rates_of(record: float, rule: str | None) -> dict[str, float]:
    """Learning rate by role of what is a group of its own, from the table of the transcription."""
    embed, head, hidden, scalars = track1.RATES[record if record in track1.RATES else 8]
    hidden = track1.RATES_OF_COMPARISON[rule] if rule else hidden
    return {"embed": embed, "pos": embed, "head": head, "scalar": scalars, "gain": scalars, "bias": scalars,
            **dict.fromkeys(HIDDEN, hidden)}


def test_every_parameter_is_under_the_records_rule_at_its_learning_rate(tables):
    for preset, (config, rows) in tables.items():
        record, rule = PRESETS[preset], COMPARISON.get(preset)
        expected = rule if rule and rule != "adam" else "adamw" if record <= 2 or rule else "muon"
        rates, groups = rates_of(record, rule), {group.name: group.hyper for group in config.optim}
        for row in rows:
            hyper, where = groups[row.group], (preset, row.name)
            assert row.rule == (expected if row.role in HIDDEN else "adamw"), where
            assert row.lr == rates[row.role], where
            if row.rule == "adamw":
                decay = .1 if record <= 2 and row.role not in ("gain", "bias") else 0
                assert (hyper.betas, hyper.eps, hyper.weight_decay) == ((.9, .95), 1e-8, decay), where
            elif row.rule == "muon":
                factors = RMS1 if record < 8 and not rule else SPECTRAL
                factor = hyper.lr_multiplier(row.fan_out, row.fan_in)
                assert factor == pytest.approx(factors.get(row.role, factors["hidden"]), rel=1e-12), where
                assert (hyper.momentum, hyper.momentum_form, hyper.nesterov) == (.95, "sgd", True), where
                assert (hyper.ns_coefficients, hyper.ns_steps, hyper.weight_decay) == ("kj5", None, 0), where
            elif row.rule == "soap":
                assert (hyper.betas, hyper.eps, hyper.weight_decay) == ((.95, .95), 1e-8, .01)
                assert (hyper.precondition_frequency, hyper.max_precond_dim, hyper.stagger) == (10, 10_000, False)
            else:
                assert (hyper.betas, hyper.eps, hyper.weight_decay, hyper.graft) == ((.95, .95), 1e-12, 0, "adam")
                assert (hyper.precondition_frequency, hyper.max_dim, hyper.stagger, hyper.graft_eps) == (
                    10, 8192, False, 1e-8)


def test_muons_rate_of_record_4_is_two_percent_in_units_of_the_spectral_norm(tables):
    config, rows = tables["04-muon"]
    shapes = {(row.fan_out, row.fan_in) for row in rows if row.rule == "muon"}
    rates = {shape: config.optim[0].hyper.lr * config.optim[0].hyper.lr_multiplier(*shape) for shape in shapes}
    assert {shape: round(rate, 5) for shape, rate in rates.items()} == {
        (768, 768): .00998, (3072, 768): .01995, (768, 3072): .01995}


def test_parameters_are_as_many_as_published(tables):
    """Records 9 to 11 had one scalar more: the first layer's mixing weight, which does nothing."""
    for preset, (_, rows) in tables.items():
        record = PRESETS[preset]
        count = Counter()
        for row in rows:
            count["hidden" if row.role in HIDDEN else "embed" if row.role == "pos" else row.role] += row.numel
        vocab = 50257 if record in (2, 4) else 50304
        expected = {"hidden": LAYERS, "embed": 768 * vocab}
        if record == 1:
            biases = 25 + 12 * (3 + 1 + 4 + 1)                       # of norms; q, k, v, attn_out, mlp_in, mlp_out
            expected |= {"embed": 768 * (vocab + 1024), "gain": 25 * 768, "bias": biases * 768}
        if record >= 8:
            expected["head"] = 768 * vocab
        scalars = 11 * (record >= 8.2) + 24 * (record >= 8.3) + 6 * (record >= 11)
        assert count == expected | ({"scalar": scalars} if scalars else {}), preset
    assert sum(row.numel for row in tables["08-untie-embed"][1]) == 162_201_600              # "162M"


def test_weights_in_bfloat16_are_the_embedding_and_the_scalars_from_record_10_on(tables):
    for preset, (config, _) in tables.items():
        late = PRESETS[preset] >= 10
        assert set(config.model.bf16_roles) == ({"embed", "scalar"} if late else set())
        assert config.model.residual == ("float32" if 2 <= PRESETS[preset] < 10 else "activations")


def test_the_residual_stream_is_float32_where_autocast_had_it():
    model = {"vocab_size": 61, "layers": 2, "heads": 2, "width": 32, "padded_vocab_size": 64}
    for preset, stream in (("09-shortcuts", torch.float32), ("10-cast-bf16", torch.bfloat16)):
        gpt = GPT(replace(config_of(preset).model, **model), 16, torch.bfloat16)
        gpt.init_weights(0)
        seen = []
        for part in (*gpt.blocks, gpt.blocks[0].mlp, gpt.blocks[1].attn.q, gpt.head_norm):
            part.register_forward_hook(
                lambda part, given, out: seen.append((out[0] if isinstance(out, tuple) else out).dtype))
        gpt(torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, 16, dtype=torch.int64))
        assert Counter(seen) == Counter([stream] * 2) + Counter([torch.bfloat16] * 3)


# ---------------------------------------------------------------- initial values

def test_initial_values_are_drawn_as_described():
    """Half-width of torch's nn.Linear default is 1/√fan_in; a normal's deviation is found to two percent."""
    for preset, record in PRESETS.items():
        config = replace(config_of(preset).model, width=96, vocab_size=512, padded_vocab_size=None)
        gpt = GPT(config, 64)
        gpt.init_weights(0)
        for name, w in gpt.named_parameters():
            w, where = w.detach(), (preset, name)
            role = gpt.roles()[name]
            if record == 1 and role in ("gain", "bias"):
                assert (w == (role == "gain")).all(), where
            elif record == 1:
                std = .02 / math.sqrt(24) if role in ("attn_out", "mlp_out") else .02
                assert w.std().item() == pytest.approx(std, rel=.03) and w.abs().max() > 3 * std, where
            elif role == "scalar":
                assert w.tolist() == {"value_mix": [.5], "shortcut": [1, 0], "skips": [1] * 6}[name.split(".")[-1]]
            elif role == "head" or (role in ("attn_out", "mlp_out") and record >= 5):
                assert not w.any(), where
            elif role == "embed" and record >= 8:
                assert w.std().item() == pytest.approx(1, rel=.03) and w.abs().max() > 3, where
            else:
                half = w.shape[1] ** -.5
                assert .997 * half < w.max() <= half and -half <= w.min() < -.997 * half, where
                assert w.std().item() == pytest.approx(half / math.sqrt(3), rel=.03), where
