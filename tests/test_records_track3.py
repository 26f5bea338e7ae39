"""The presets of track 3 against their rows: tables, schedules, first losses, and twenty steps of their mathematics."""
import gc
import math
import re

import jsonschema
import pytest
import torch

from harness.load import load
from harness.preflight import check, table_of
from harness.schema import generate
from harness.yaml_tree import plain as unlabelled
from harness.yaml_tree import read_text
from model.gpt import GPT
from optim.driver import Optimizer
from optim.schedules import Schedule
from tests import transcriptions_track3 as plain
from tests.conftest import ROOT
from tests.test_initial_losses import text_like_tokens

PRESETS = sorted(path.stem for path in (ROOT / "configs" / "records" / "track3").glob("*.yaml"))
TINY = [f"model.{key}={value}" for key, value in dict(layers=plain.LAYERS, heads=plain.HEADS, width=plain.WIDTH,
                                                      vocab_size=plain.VOCAB).items()]
SCHEMA = jsonschema.Draft202012Validator(generate())
UNTUNED = {"splus", "scion", "gluon", "muonclip"}
HAVE_BASES = {"klsoaph", "soaph", "splus"}
ROUNDING = dict.fromkeys(PRESETS, 0.012) | {"adamw": 3e-4, "gluon": .02, "scion": .12, "splus": 1e-4}


def preset(name, *overrides):
    return load(f"records/track3/{name}.yaml", overrides).config


def test_every_row_has_a_preset_and_a_transcription():
    assert set(PRESETS) == set(plain.ROWS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_where_it_is_from_and_agrees_with_the_schema(name):
    content = (ROOT / "configs" / "records" / "track3" / f"{name}.yaml").read_text()
    head = content[:content.index("\nextends:")]
    assert head.startswith("# yaml-language-server: $schema=../../schema.json\n# torchrun ")
    assert f"train.py --config records/track3/{name}.yaml\n" in head
    said = dict(re.findall(r"^# (source|published|data|uncertain|differs): (.*)$", head, re.M))
    assert ("UNTUNED" in head) == (said["published"] == "nothing: nobody has this row") == (name in UNTUNED)
    steps = plain.ROWS[name].steps
    assert name in UNTUNED or f" at step {steps} (n=" in said["published"]
    assert said["data"] == f"{-(-steps // 190)} shards of FineWeb-10B"        # 190 steps take a shard
    assert said["source"] and said["uncertain"]
    SCHEMA.validate(unlabelled(read_text(content, name)))
    assert preset(name).name == f"track3-{name}"


# ---- what records.md tabulates: matrices' rule with lr and decay, AdamW of embedding, head, vectors with its decay

OLD, TUNED = (.3, .003125, .01, 0), (.7, .004, .015, .001)
DEFAULT = (1, 1, 0, 0)                                    # nn.Linear's width of q k v, MLP in, attention out, MLP out
NORMAL = None                                             # N(0, .33/fan_in) of the inner ones, zero of the projections
ON_BALLS = (1, 1.5, 1.25, 3)
ROWS = {
    "muon": (3250, "muon", .025, .05, TUNED, NORMAL, dict(momentum=.95, ns_coefficients="exact12", nesterov=True)),
    "adamw": (5625, "adamw", .0015, .1, OLD, DEFAULT, dict(betas=(.9, .95), eps=1e-10)),
    "adamh": (4875, "adamw", .018, 0, OLD, ON_BALLS, dict(betas=(.9, .95), eps=1e-8)),
    "muonh": (3325, "muon", .018, 0, OLD, ON_BALLS, dict(momentum=.95, ns_coefficients="exact12")),
    "muon2": (3325, "muon2", .1, .0125, OLD, DEFAULT, dict(beta2=.95, eps=1e-10)),
    "normuonh": (3250, "normuon", .018, 0, OLD, ON_BALLS, dict(momentum=.95, beta2=.95)),
    "normuon": (3250, "normuon", .035, .025, OLD, NORMAL, dict(momentum=.95, beta2=.95, ns_coefficients="exact12")),
    "klsoaph": (3125, "klsoap", .018, 0, OLD, ON_BALLS, dict(betas=(.95, .9), shampoo_beta=.9,
                                                             precondition_frequency=1)),
    "shampoo": (4100, "shampoo", .0015, .2, OLD, NORMAL, dict(betas=(.9, .95), precondition_frequency=5, max_dim=8192,
                                                              graft="adam", graft_eps=1e-10)),
    "spectral": (8225, "spectral", .03, .015, OLD, NORMAL, dict(ns_coefficients="exact12")),
    "soaph": (3125, "soap", .018, 0, OLD, ON_BALLS, dict(betas=(.95, .9), precondition_frequency=1,
                                                         bias_correction=False, first_step="take")),
    "splus": (3250, "splus", .2, .01, None, NORMAL, dict(betas=(.9, .999))),
    "scion": (3250, "scion", 3.6e-4, None, None, NORMAL, dict(radius=50, momentum=.1)),
    "gluon": (3250, "gluon", 1 / 70, None, None, NORMAL, dict(momentum=.9)),
    "muonclip": (3250, "muonclip", .0015, .1, TUNED, NORMAL, dict(momentum=.95, tau=100)),
}
COUNTS = {"hidden": (72, 84_934_656), "embed": (1, 38_633_472), "head": (1, 38_633_472), "gain": (26, 19_968),
          "bias": (73, 12 * (5 * 768 + 3072) + 50_304)}


@pytest.mark.parametrize("name", PRESETS)
def test_groups_counts_and_settings_are_the_rows(name):
    steps, rule, lr, decay, rest, inits, settings = ROWS[name]
    cfg = preset(name)
    hidden = next(group for group in cfg.optim if group.name == "hidden")
    assert (cfg.steps, hidden.rule, hidden.hyper.lr, getattr(hidden.hyper, "weight_decay", None)) == (
        steps, rule, pytest.approx(lr), decay)
    assert {key: getattr(hidden.hyper, key) for key in settings} == settings
    assert hidden.hyperball == (inits == ON_BALLS)
    assert (cfg.batch_tokens, cfg.seq_len, cfg.val_tokens, cfg.loss_reduction) == (2**19, 1024, 20 * 2**19, "sum")
    with torch.device("meta"):
        model = GPT(cfg.model, cfg.seq_len)
    check(cfg, model)
    rows = table_of(cfg, model)
    by_kind = {kind: [row for row in rows if plain.kind(row.name) == kind] for kind in COUNTS}
    assert {kind: (len(its), sum(row.numel for row in its)) for kind, its in by_kind.items()} == COUNTS
    assert {row.group for row in by_kind["hidden"]} == {"hidden"}
    if rest is None:                                      # one rule for everything
        assert {group.rule for group in cfg.optim} == {rule}
        return
    assert {(row.rule, row.lr) for kind in ("embed", "head") for row in by_kind[kind]} == {
        ("adamw", rest[0]), ("adamw", rest[1])}
    assert {(row.rule, row.lr) for kind in ("gain", "bias") for row in by_kind[kind]} == {("adamw", rest[2])}
    for group in cfg.optim[1:]:
        assert (group.hyper.betas, group.hyper.eps, group.hyper.weight_decay) == ((.8, .95), 1e-10, rest[3])


@pytest.mark.parametrize("name", PRESETS)
def test_the_factor_on_the_learning_rate_of_each_shape_is_the_rows(name):
    rule = next(group for group in preset(name).optim if group.name == "hidden").hyper
    muon = dict.fromkeys(("muon", "muonh", "muon2", "normuon", "normuonh", "spectral"), (1, 2, 1))
    adam = dict.fromkeys(("adamw", "adamh", "shampoo", "klsoaph", "soaph"), (1, 1, 1))
    others = {"splus": (1 / 768, 1 / 1920, 1 / 1920), "scion": (50, 100, 25), "gluon": (1, 2, .5),
              "muonclip": (.2 * 768**.5, .2 * 3072**.5, .2 * 3072**.5)}
    found = [rule.lr_multiplier(*shape) for shape in ((768, 768), (3072, 768), (768, 3072))]
    assert found == pytest.approx((muon | adam | others)[name])


@pytest.mark.parametrize("name", PRESETS)
def test_schedules_are_the_rows_at_every_step(name):
    cfg, row = preset(name), plain.ROWS[name]
    for group in cfg.optim:
        published = row.schedule if group.name == "hidden" else row.rest_schedule
        schedule = group.schedule or cfg.schedule
        assert [schedule.at(s, cfg.steps) for s in range(cfg.steps)] == pytest.approx(
            [published(s) for s in range(cfg.steps)], abs=1e-12), group.name


POINTS = {                                                # (step, factor) of matrices; of the rest: by hand
    "muon": ([(0, 1), (975, 1), (976, 2274 / 2275), (3249, 1 / 2275)], [(975, 1), (3249, 1 / 2275)]),
    "adamw": ([(0, 1 / 250), (249, 1), (1687, 1), (5624, 1 / 3937.5)], [(0, 1 / 250), (124, .5)]),
    "adamh": ([(0, 0), (125, .5), (249, .996), (250, 4625 / 4875), (4874, 1 / 4875)], [(0, 1), (2925, 1), (3900, .5)]),
    "normuonh": ([(0, 1), (1310, 1965 / 3275), (3249, 26 / 3275)], [(1965, 1), (3249, 26 / 1310)]),
    "normuon": ([(990, 1), (3249, 51 / 2310)], [(3249, 51 / 2310)]),
    "shampoo": ([(1245, 1), (4099, 51 / 2905)], [(4099, 51 / 2905)]),
    "spectral": ([(2550, 1), (8224, 276 / 5950)], [(8224, 276 / 5950)]),
    "soaph": ([(0, 1), (1600, .5**1.25), (3124, (76 / 3200)**1.25)], [(1920, 1), (2560, .5)]),
    "splus": ([(0, 1 / 200), (199, 1), (3249, 1)], [(3249, 1)]),
}


@pytest.mark.parametrize("name", POINTS)
def test_schedules_pass_through_published_points(name):
    cfg = preset(name)
    for group, points in ((cfg.optim[0], POINTS[name][0]), (cfg.optim[1], POINTS[name][1])):
        schedule = group.schedule or cfg.schedule
        assert [schedule.at(s, cfg.steps) for s, _ in points] == pytest.approx([y for _, y in points], abs=1e-12)


def test_a_cool_down_with_a_power_ends_at_its_floor():
    schedule = Schedule(cooldown_frac=.5, floor=.2, power=2)
    assert [schedule.at(s, 100) for s in (0, 50, 75, 100)] == pytest.approx([1, 1, .4, .2])


# ---- initial values

@pytest.mark.parametrize("name", ["muon", "adamw", "adamh", "scion", "muonclip"])
@torch.no_grad()
def test_initial_values_are_the_rows_and_the_first_loss_is_10_8258(name):
    """At full size. The rows without a case start from one of these: see the next test."""
    gc.collect()
    cfg = preset(name)
    model = Product(cfg, torch.float32).model if name == "scion" else started(cfg, torch.float32)
    inits = ROWS[name][5]
    for layer, part, at, fan_in in ((0, "attn.q", 0, 768), (11, "attn.v", 0, 768), (5, "mlp.up", 1, 768),
                                    (5, "attn.out", 2, 768), (5, "mlp.down", 3, 3072)):
        W, b = (model.get_parameter(f"blocks.{layer}.{part}.{which}") for which in ("weight", "bias"))
        if inits is NORMAL and name == "scion":           # on the border of its ball: √(n/m) σ₁ = 50, all σ alike
            m, n = W.shape
            assert W.norm() == pytest.approx(50 * (m / n)**.5 * min(m, n)**.5, rel=1e-4)
        elif inits is NORMAL:
            assert W.std() == pytest.approx((.33 / fan_in)**.5 * (at < 2), rel=.01)
            assert at > 1 or W.abs().max() > 4 * W.std()
        else:
            assert W.abs().max() == pytest.approx(inits[at] * fan_in**-.5, rel=1e-3)
            assert W.std() == pytest.approx(inits[at] * (3 * fan_in)**-.5, rel=.01)
        default = inits is not NORMAL and at < 2          # nn.Linear's biases, but not of the projections
        assert b.abs().max() == pytest.approx(fan_in**-.5 * default, rel=.01)
    assert model.embed.weight.float().std() == pytest.approx(1, rel=.01)
    row = text_like_tokens(65)[None]
    loss = model(row[:, :-1], row[:, 1:]).item() / 64
    assert abs(loss - math.log(50304)) < 5e-5             # every log prints 10.8258


def test_the_other_rows_start_from_one_of_these():
    alike = {"muon": ["normuon", "shampoo", "spectral", "splus", "gluon"], "adamw": ["muon2"],
             "adamh": ["muonh", "normuonh", "klsoaph", "soaph"]}
    for one, others in alike.items():
        assert {preset(other).model.init for other in others} == {preset(one).model.init}
    assert {name for one in alike for name in (one, *alike[one])} | {"scion", "muonclip"} == set(PRESETS)


def started(cfg, dtype, masters=None):
    """A model with the run's first weights."""
    model = GPT(cfg.model, cfg.seq_len, dtype, track_logits=cfg.needs_logits)
    model.init_weights(cfg.seed)
    if masters is not None:
        model.to(masters)
    return model


# ---- twenty steps

@pytest.fixture
def double(monkeypatch):
    """Everything in float64: what the product computes in float32, and the products of orthogonalisations."""
    default, as_float = torch.get_default_dtype(), torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor.double())
    orthogonalise_in(monkeypatch, torch.float64)
    yield
    monkeypatch.setattr(torch.Tensor, "float", as_float)
    torch.set_default_dtype(default)


def orthogonalise_in(monkeypatch, dtype):
    for module in ("muon", "normuon", "muon2", "spectral", "geometry", "muonclip"):
        monkeypatch.setattr(f"optim.{module}.iteration_dtype", lambda *which: dtype)


def batches(count, rows=8, length=32):
    """Sequences in which most tokens follow from the one before."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        noise = torch.randint(plain.VOCAB, (rows, length + 1), generator=generator)
        line = (torch.randint(plain.VOCAB, (rows, 1), generator=generator) + 7 * torch.arange(length + 1)) % plain.VOCAB
        row = torch.where(torch.rand(rows, length + 1, generator=generator) < .8, line, noise)
        yield row[:, :-1], row[:, 1:]


class Product:
    """train.py's step without files and ranks."""

    def __init__(self, cfg, dtype, masters=None):
        self.cfg, self.model = cfg, started(cfg, dtype, masters)
        self.params = dict(self.model.named_parameters())
        self.optimizer = Optimizer(self.params, self.model.roles(), cfg.optim, grad_clip=cfg.grad_clip,
                                   heads=cfg.model.heads, tied=cfg.model.tied, qk=self.model.qk_parameters())
        self.optimizer.init_weights(cfg.seed)

    def weights(self):
        return {name: p.detach().double().clone() for name, p in self.params.items()}

    def step(self, s, tokens, targets):
        self.optimizer.set_hyperparameters(s, self.cfg.schedule, self.cfg.steps)
        self.model.reset_max_logits()
        loss = self.model(tokens, targets)
        loss.backward()
        self.optimizer.step(s, loss.detach(), max_logits=self.model.max_logits())
        return loss.item() / targets.numel()


def the_products_bases(product, bases, used):
    """For the transcription: the product's bases after this step, having found them right for its own sides."""
    def of(name):
        sides = iter(("q_left", "q_right"))

        def given(S, Q_old, kind):
            Q = bases[name][next(sides)]
            assert torch.allclose(Q.T @ Q, torch.eye(len(Q)), atol=1e-10)
            if kind == "rising" and torch.equal(Q, Q_old):
                return Q                                  # not renewed
            made = Q.T @ S @ (Q_old if kind == "qr" else Q)
            wrong = made.tril(-1) if kind == "qr" else made - made.diag().diag()
            assert wrong.norm() <= 1e-9 * made.norm(), (name, kind, wrong.norm() / made.norm())
            order = {"falling": -1, "rising": 1}.get(kind, 0) * made.diag().diff()
            assert (order >= -1e-9 * made.norm()).all()
            used.add(kind)
            return Q
        return given
    return of


def twenty_steps(name, product, tau=None):
    """Losses of the product and of the transcription, from the product's first weights."""
    row, weights, state, ours, theirs, used = plain.ROWS[name], product.weights(), {}, [], [], set()
    row = row._replace(tau=tau or row.tau)
    for s, (tokens, targets) in enumerate(batches(20)):
        ours.append(product.step(s, tokens, targets))
        given = lambda name: plain.own_bases
        if name in HAVE_BASES:
            given = the_products_bases(product, product.optimizer.state_dict(), used)
        theirs.append(plain.step(row, weights, state, s, tokens, targets, given))
    assert ours[-1] < ours[0] - (.002 if name == "splus" else .03)        # it learns, or there were nothing to compare
    apart = {key: (product.params[key].detach() - W).abs().max() for key, W in weights.items()}
    return (torch.tensor(ours) - torch.tensor(theirs)).abs().max(), apart, used, weights


@pytest.mark.parametrize("name", PRESETS)
def test_twenty_steps_are_those_of_the_transcription_in_float64(name, double):
    cfg = preset(name, *TINY)
    gap, apart, used, _ = twenty_steps(name, Product(cfg, torch.float64, torch.float64))
    assert gap < 1e-8, gap                                # found: 2e-15 to 2e-10, the most of it the norm's 1e-7
    assert max(apart.values()) < 1e-6, apart
    assert used == {"klsoaph": {"falling", "qr"}, "soaph": {"falling", "qr"}, "splus": {"rising"}}.get(name, set())


def test_heads_above_the_bound_are_clipped_as_the_transcription_does(double):
    """The preset's own bound is 100, which no tiny model reaches."""
    cfg = preset("muonclip", *TINY, "optim.hidden.tau=0.02")
    gap, _, _, weights = twenty_steps("muonclip", Product(cfg, torch.float64, torch.float64), tau=.02)
    assert gap < 1e-8
    *_, unclipped = twenty_steps("muonclip", Product(preset("muonclip", *TINY), torch.float64, torch.float64))
    name = "blocks.1.attn.q.weight"
    assert weights[name].norm() < .9 * unclipped[name].norm()


@pytest.mark.parametrize("name", PRESETS)
def test_in_its_own_precision_a_preset_stays_by_the_transcription(name, monkeypatch):
    """bfloat16 activations, embedding and Newton-Schulz steps against float64. Found, largest of twenty steps: .002 to
    .004; AdamW 6e-5 and SPlus 2e-5, whose warm-ups hardly move in twenty; Gluon .006, Scion .042."""
    orthogonalise_in(monkeypatch, torch.bfloat16)
    product = Product(preset(name, *TINY), torch.bfloat16)
    row, weights, state, gaps = plain.ROWS[name], product.weights(), {}, []
    for s, (tokens, targets) in enumerate(batches(20)):
        gaps.append(abs(product.step(s, tokens, targets) - plain.step(row, weights, state, s, tokens, targets)))
    assert 0 < max(gaps) < ROUNDING[name], max(gaps)
