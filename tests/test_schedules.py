import pytest
from pydantic import ValidationError

from optim.schedules import Point, Schedule

# Published schedules of the speedrun: (schedule, run steps, {step: factor}). The factors are written from the
# records' formulas, η = (N-s)/c, η = (s+1)/w and w·1 + (1-w)·0.1, by hand.
LLM_C = Schedule(shape="cosine", warmup_steps=700)
ADAMW = Schedule(warmup_steps=256, cooldown_steps=2048)
PUBLISHED = {
    "1 llm.c": (LLM_C, 19560, {0: 1 / 700, 699: 1, 700: 1, 10130: .5, 19560: 0}),
    "2 AdamW": (ADAMW, 9536, {0: 1 / 256, 127: .5, 255: 1, 7488: 1, 8512: .5, 9535: 1 / 2048, 9536: 0}),
    "4 Muon": (Schedule(cooldown_steps=1800), 6200, {0: 1, 4400: 1, 5300: .5, 6199: 1 / 1800, 6200: 0}),
    "8 UntieEmbed": (Schedule(cooldown_steps=1308), 4578, {0: 1, 3270: 1, 3924: .5, 4577: 1 / 1308}),
    "19 Fp8LmHead": (Schedule(cooldown_frac=.4, floor=.1), 1395, {0: 1, 837: 1, 1116: .55, 1395: .1}),
    "20 Sub3Min": (Schedule(cooldown_frac=.4, floor=.1), 1393, {835: 1, 1392: .1 + .9 / 557.2}),
    "35 extension": (Schedule(length=1640, cooldown_frac=.5, floor=.1), 1680,
                     {0: 1, 820: 1, 1230: .55, 1640: .1, 1679: .1}),
    "track 3": (Schedule(cooldown_frac=.7), 3250,
                {0: 1, 975: 1, 976: 2274 / 2275, 2113: 1137 / 2275, 3249: 1 / 2275}),
}


@pytest.mark.parametrize("record", PUBLISHED)
def test_schedules_pass_through_the_published_points(record):
    schedule, steps, points = PUBLISHED[record]
    assert {s: schedule.at(s, steps) for s in points} == pytest.approx(points, abs=1e-12)


def test_llm_c_learning_rates_are_those_in_its_log():
    assert [f"{6e-4 * LLM_C.at(step, 19560):.2e}" for step in (0, 9999)] == ["8.57e-07", "3.07e-04"]


def test_momentum_warm_up_and_cool_down_are_piecewise():
    momentum = Schedule(shape="piecewise", points=(Point(step=0, value=.85), Point(step=500, value=.95),
                                                   Point(frac=.9, value=.95), Point(frac=1.0, value=.85)))
    expected = {0: .85, 1: .8502, 250: .9, 500: .95, 3000: .95, 3600: .95, 3800: .9, 4000: .85, 9000: .85}
    assert {s: momentum.at(s, 4000) for s in expected} == pytest.approx(expected, abs=1e-12)


def test_two_points_at_one_step_make_a_jump():
    stages = Schedule(shape="piecewise", points=(Point(step=10, value=1), Point(step=10, value=2)))
    assert [stages.at(s, 20) for s in (0, 9, 10, 19)] == [1, 1, 2, 2]


def test_no_cooldown_is_constant():
    assert {Schedule().at(s, 100) for s in (0, 50, 99, 100, 500)} == {1.0}
    assert {Schedule(cooldown_steps=0, floor=.3).at(s, 100) for s in (0, 99, 100)} == {1.0}


def test_steps_beyond_the_length_keep_the_floor():
    for shape in ({"cooldown_steps": 5}, {"cooldown_frac": .5}, {"shape": "cosine"}):
        schedule = Schedule(length=10, floor=.2, **shape)
        assert [schedule.at(s, 50) for s in (10, 11, 49)] == pytest.approx([.2] * 3, abs=1e-15)


@pytest.mark.parametrize("shape", [{"cooldown_steps": 50}, {"shape": "cosine"}])
def test_a_run_shorter_than_its_warm_up_stays_between_zero_and_one(shape):
    schedule = Schedule(warmup_steps=100, **shape)
    values = [schedule.at(s, 20) for s in range(25)]
    assert all(0 <= v <= .25 for v in values) and values[0] > 0
    assert schedule.at(100, 100) == schedule.at(200, 100) == 0


@pytest.mark.parametrize("wrong, complaint", [
    (dict(cooldown_steps=1, cooldown_frac=.1), "give one of them"),
    (dict(shape="piecewise"), "needs 'points'"),
    (dict(shape="piecewise", length=9, points=(Point(step=0, value=1),)), "nothing reads 'length'"),
    (dict(warmup=3), "warmup"),
    (dict(floor=1.5), "floor"),
    (dict(points=({"value": 1.0},)), "exactly one of 'step' and 'frac'"),
    (dict(points=({"value": 1.0, "step": 1, "frac": .5},)), "exactly one of 'step' and 'frac'"),
])
def test_impossible_schedules_are_refused(wrong, complaint):
    with pytest.raises(ValidationError, match=complaint):
        Schedule(**wrong)


def test_points_out_of_order_are_refused():
    schedule = Schedule(shape="piecewise", points=(Point(frac=.5, value=1), Point(step=60, value=0)))
    assert schedule.at(0, 100) == 1
    with pytest.raises(ValueError, match="in order"):
        schedule.at(0, 200)


def test_read_when_names_only_keys_that_exist():
    fields = Schedule.__dataclass_fields__
    assert all(key in fields and on in fields for key, when in Schedule.READ_WHEN.items() for on in when)
