"""Layers, budgets, plans and the rules that need one number per layer."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orca_rank import ranks
from orca_rank.measuring.records import Gap, Spectrum
from orca_rank.ranks import Budget, Layer, RankPlan
from orca_rank.ranks.allocate import greedy, spent


def layer(name, d_in=32, d_out=64, value=1.0, p=0.01, **measured):
    """In the form of layers.json."""
    gap = {"mmd": {"value": value, "low": 0.0, "high": 2.0, "p": p}}
    return Layer.from_dict({"name": name, "d_in": d_in, "d_out": d_out, "gap": gap, **measured})


def layers_of(gaps, widths=(32,)):
    return [layer(f"l{i}", widths[i % len(widths)], 48, float(gap)) for i, gap in enumerate(gaps)]


GAP_RULES = (ranks.proportional, ranks.shuffled, ranks.inverse, ranks.ibp_count, ranks.ibp_stick, ranks.beta_bernoulli)


def test_layer_reads_and_writes_the_form_of_layers_json():
    spectrum = {"singular_values": [3.0, 1.0], "null": 2.0, "energy": 10.5, "rank": 1}
    record = {
        "name": "a", "d_in": 3, "d_out": 5,
        "gap": {"mmd": {"value": 0.1, "low": -0.1, "high": 0.2, "p": 0.005, "p_family": None}},
        "weight": {"stable_rank": 2.0, "effective_rank": 2.5}, "intrinsic_dimension": {"input": 3.0, "output": 4.0},
        "importance": 0.25, "fisher": 1e-9, "ot_map": spectrum,
        "activation": {"singular_values": [], "null": None, "energy": 0.0, "rank": None}, "gradient": spectrum,
    }  # fmt: skip
    layer = Layer.from_dict(json.loads(json.dumps(record)))
    assert layer.to_dict() == record
    assert list(layer.to_dict()) == list(record)
    assert Layer.from_dict(layer.to_dict()) == layer
    assert (layer.gap["mmd"], layer.spectra["ot_map"].singular_values) == (Gap(0.1, -0.1, 0.2, 0.005), (3.0, 1.0))
    assert (layer.cost, layer.full_rank) == (8, 3)
    assert Layer.from_dict({**record, "rank": 3, "parameters": 24}) == layer  # a row of plan.json says more
    assert Layer("a", 3, 5).to_dict() == {"name": "a", "d_in": 3, "d_out": 5, "gap": {}}


def test_a_rank_above_the_null_is_counted_where_a_spectrum_does_not_say_it():
    assert Spectrum.from_dict({"singular_values": [3, 2, 1], "null": 1.5, "energy": 14}).rank == 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"name": "a", "d_in": 3}, "d_out"),
        ({"gap": {"mmd": {"low": 0.1}}}, r"layer a: value must be a finite number, got None"),
        ({"gap": {"mmd": {"value": float("nan")}}}, r"layer a: value.*nan"),
        ({"gap": {"mmd": 0.1}}, r"layer a: mmd must be an object, got 0\.1"),
        ({"weight": {"stable_rank": 2.0}}, r"layer a: effective_rank"),
        ({"fisher": "1"}, r"layer a: fisher.*'1'"),
        ({"ot_map": {"null": 1.0, "energy": 1.0}}, r"layer a: a spectrum needs a list of singular_values, got None"),
    ],
)
def test_a_record_that_lacks_a_number_says_which(record, message):
    shape = {} if "d_in" in record else {"name": "a", "d_in": 3, "d_out": 5}
    with pytest.raises(ValueError, match=message):
        Layer.from_dict(shape | record)


@pytest.mark.parametrize("given", [{}, {"mean_rank": 1, "parameters": 9}, {"total_rank": -1}])
def test_budget_takes_exactly_one_limit(given):
    with pytest.raises(ValueError, match="budget"):
        Budget(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean_rank": "abc"}, r"mean_rank must be a finite number >= 0, got 'abc'"),
        ({"mean_rank": float("inf")}, "mean_rank.*inf"),
        ({"mean_rank": float("nan")}, "mean_rank.*nan"),
        ({"mean_rank": True}, "mean_rank.*True"),
        ({"total_rank": 7.9}, r"total_rank must be a whole number >= 0, got 7\.9"),
        ({"parameters": "100"}, "parameters.*'100'"),
        ({"mean_rank": 4, "r_min": 1.5}, r"r_min.*1\.5"),
        ({"mean_rank": 4, "r_min": None}, "r_min.*None"),
        ({"mean_rank": 4, "r_min": 3, "r_max": 2}, "r_min <= r_max"),
    ],
)
def test_a_budget_of_other_things_than_numbers_says_which(given, message):
    with pytest.raises(ValueError, match=message):
        Budget(**given)


def test_a_budget_takes_numpy_numbers_and_whole_floats():
    budget = Budget(total_rank=np.int64(8), r_max=np.int32(5))
    assert budget == Budget(total_rank=8, r_max=5)
    plan = ranks.uniform(layers_of([1, 2]), budget)
    assert RankPlan.from_json(plan.to_json()) == plan
    assert Budget(parameters=2e5).to_dict()["parameters"] == 200_000
    assert Budget(mean_rank=np.float64(2.5)).allowed(layers_of([1, 2])) == 5


def test_budget_counts_in_its_own_unit():
    layers = [layer("a", 10, 20), layer("b", 30, 40)]
    assert Budget(mean_rank=2.5).allowed(layers) == 5
    assert Budget(total_rank=7).allowed(layers) == 7
    assert Budget(parameters=300).allowed(layers) == 300
    plan = RankPlan({"a": 1, "b": 2})
    assert Budget(parameters=300).used(plan, layers) == 30 + 140 == plan.parameters(layers)
    assert Budget(total_rank=7).used(plan, layers) == 3
    with pytest.raises(ValueError, match="r_min"):
        ranks.uniform(layers, Budget(total_rank=3, r_min=2))


def test_plan_refuses_what_is_no_rank():
    with pytest.raises(ValueError, match="negative"):
        RankPlan({"a": -1})
    with pytest.raises(TypeError, match="integer"):
        RankPlan({"a": True})
    assert RankPlan({"a": np.int64(3)}).ranks == {"a": 3}


def test_check_is_strict():
    layers = [layer("a"), layer("b")]
    assert RankPlan({"a": 0, "b": 32}).check(layers)["a"] == 0
    with pytest.raises(ValueError, match=r"unknown.*c"):
        RankPlan({"a": 1, "b": 1, "c": 1}).check(layers)
    with pytest.raises(ValueError, match="nothing of b"):
        RankPlan({"a": 1}).check(layers)
    with pytest.raises(ValueError, match="allow_above_full"):
        RankPlan({"a": 1, "b": 33}).check(layers)
    RankPlan({"a": 1, "b": 33}, allow_above_full=True).check(layers)


def test_plan_survives_json():
    plan = RankPlan({"a": 0, "b": 3}, "proportional", Budget(parameters=500, r_max=4), {"gamma": 2.0}, True, "abc")
    assert RankPlan.from_json(plan.to_json()) == plan
    assert "schema" in json.loads(plan.to_json())
    with pytest.raises(ValueError, match="ranks"):
        RankPlan.from_json('{"a": 1}')
    with pytest.raises(ValueError, match="schema"):
        RankPlan.from_json('{"schema": 99, "ranks": {"a": 1}}')
    for text in ("[1]", "nonsense"):
        with pytest.raises(ValueError, match="JSON object"):
            RankPlan.from_json(text)
    for budget in ('{"foo": 1}', "3"):
        with pytest.raises(ValueError, match=r"budget.*mean_rank.*got"):
            RankPlan.from_json(f'{{"ranks": {{"a": 1}}, "budget": {budget}}}')


def test_uniform():
    layers = layers_of([1, 2, 3])
    assert ranks.uniform(layers, r=5).ranks == {"l0": 5, "l1": 5, "l2": 5}
    assert set(ranks.uniform(layers, Budget(mean_rank=4)).ranks.values()) == {4}
    assert ranks.uniform(layers, Budget(total_rank=7)).ranks == {"l0": 3, "l1": 2, "l2": 2}
    with pytest.raises(ValueError, match="allow_above_full"):
        ranks.uniform(layers, r=33)
    assert ranks.uniform(layers, r=1024, allow_above_full=True)["l0"] == 1024
    with pytest.raises(ValueError, match=r"rank\.r"):
        ranks.uniform(layers)


def test_proportional_is_proportional_where_it_can_be():
    layers = layers_of([1, 2, 4])
    assert list(ranks.proportional(layers, Budget(total_rank=14)).ranks.values()) == [2, 4, 8]
    assert list(ranks.proportional(layers, Budget(total_rank=21), gamma=2).ranks.values()) == [1, 4, 16]
    assert list(ranks.proportional(layers, Budget(total_rank=12), gamma=0).ranks.values()) == [4, 4, 4]
    # A cap at 5 hands the rest on in proportion; a floor takes from the others.
    assert list(ranks.proportional(layers, Budget(total_rank=11, r_max=5)).ranks.values()) == [2, 4, 5]
    assert list(ranks.proportional(layers, Budget(total_rank=14, r_min=3)).ranks.values()) == [3, 4, 7]


def test_layers_without_a_gap_stay_at_r_min():
    layers = layers_of([-0.1, 0.0, 3.0, 1.0])
    assert list(ranks.proportional(layers, Budget(total_rank=8)).ranks.values()) == [0, 0, 6, 2]
    assert list(ranks.proportional(layers, Budget(total_rank=10, r_min=1)).ranks.values()) == [1, 1, 6, 2]
    quiet = [layer("a", value=1.0, p=0.9), layer("b", value=1.0, p=0.01)]
    assert ranks.proportional(quiet, Budget(total_rank=4), p_max=0.05).ranks == {"a": 0, "b": 4}


def test_shuffled_permutes_the_ranks_of_proportional():
    layers = layers_of([1, 2, 3, 4, 5, 6])
    budget = Budget(total_rank=21)
    plain = ranks.proportional(layers, budget)
    drawn = [ranks.shuffled(layers, budget, permutation=permutation) for permutation in range(5)]
    assert all(sorted(plan.ranks.values()) == sorted(plain.ranks.values()) for plan in drawn)
    assert len({tuple(plan.ranks.values()) for plan in drawn}) > 1
    assert ranks.shuffled(layers, budget, permutation=3) == drawn[3]


def test_inverse_is_proportional_to_one_over_the_gap():
    assert list(ranks.inverse(layers_of([1, 2, 4]), Budget(total_rank=14)).ranks.values()) == [8, 4, 2]
    assert list(ranks.inverse(layers_of([1, 2, 4]), Budget(total_rank=21), gamma=2).ranks.values()) == [16, 4, 1]
    assert list(ranks.inverse(layers_of([1, 2, 4]), Budget(total_rank=12), gamma=0).ranks.values()) == [4, 4, 4]
    # 1/D of D is D of 1/D, whatever the unit.
    gaps, budget = np.array([0.3, 1.2, 0.7, 2.0]), Budget(total_rank=40)
    for scale in (1.0, 1e-12, 1e12):
        assert (
            ranks.inverse(layers_of(scale * gaps), budget).ranks
            == ranks.proportional(layers_of(1 / gaps), budget).ranks
        )
    # What does not differ counts as what differs least.
    assert list(ranks.inverse(layers_of([-0.1, 0.0, 0.5, 1.0]), Budget(total_rank=14)).ranks.values()) == [4, 4, 4, 2]
    assert list(ranks.inverse(layers_of([-0.1, 0.0]), Budget(total_rank=4)).ranks.values()) == [2, 2]
    assert list(ranks.inverse(layers_of([1, 2, 4]), Budget(total_rank=11, r_max=5)).ranks.values()) == [5, 4, 2]
    for gamma in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"gamma of rank=inverse must be a finite number >= 0"):
            ranks.inverse(layers_of([1, 2]), budget, gamma=gamma)


def test_from_file(tmp_path):
    layers = layers_of([1, 2])
    path = tmp_path / "ranks.json"
    path.write_text(RankPlan({"l0": 2, "l1": 0}, "uniform").to_json())
    assert ranks.from_file(layers, path=path).ranks == {"l0": 2, "l1": 0}
    path.write_text('{"l0": 40, "l1": 1}')
    with pytest.raises(ValueError, match="above"):
        ranks.from_file(layers, path=str(path))
    assert ranks.from_file(layers, path=path, allow_above_full=True)["l0"] == 40
    path.write_text('{"l0": 2}')
    with pytest.raises(ValueError, match="l1"):
        ranks.from_file(layers, path=path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="object"):
        ranks.from_file(layers, path=path)
    with pytest.raises(FileNotFoundError, match=r"plan/plan\.json.*finetune/<tag>/ranks\.json"):
        ranks.from_file(layers, path=tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"rank\.path"):
        ranks.from_file(layers)


def test_from_file_reads_what_the_plan_stage_writes(tmp_path):
    layers, path = layers_of([1, 2]), tmp_path / "plan.json"
    rows = [{"name": "l0", "d_in": 32, "rank": 3}, {"name": "l1", "d_in": 32, "rank": 0}]
    path.write_text(json.dumps({"schema": 1, "rule": None, "layers": rows, "rules": {"uniform": {"l0": 9}}}))
    assert ranks.from_file(layers, path=path).ranks == {"l0": 3, "l1": 0}
    for other in ({"layers": [{"name": "l0"}]}, {"layers": [1]}, {"l0": "1", "l1": 0}, {"schema": 9, "ranks": {}}):
        path.write_text(json.dumps(other))
        with pytest.raises(ValueError, match=r"plan\.json is no rank plan"):
            ranks.from_file(layers, path=path)


@pytest.mark.parametrize("rule", [ranks.proportional, ranks.ibp_count])
def test_gamma_is_a_number_that_gives_finite_weights(rule):
    layers, budget = layers_of([0, 1, 2]), Budget(total_rank=6)
    for gamma in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="gamma must be a finite number"):
            rule(layers, budget, gamma=gamma)
    with pytest.raises(ValueError, match=r"gamma=-1.*infinite weight"):
        rule(layers, budget, gamma=-1)
    assert rule(layers_of([1, 2]), budget, gamma=-1).ranks == {"l0": 4, "l1": 2}


def test_missing_p_values_name_both_options():
    with pytest.raises(ValueError, match=r"gap\.permutations > 0.*gap\.slow\.permutations > 0"):
        ranks.proportional([layer("a", p=None)], Budget(total_rank=1), p_max=0.05)


def test_a_missing_measurement_names_the_stage_and_the_option():
    layers = [layer("a"), Layer("b", 4, 4)]
    budget = Budget(mean_rank=2)
    for rule in GAP_RULES:
        with pytest.raises(ValueError, match=r"(?s)b.*stage=measure.*gap\.metrics"):
            rule(layers, budget)
    for rule, option in ((ranks.stable_rank, "weight"), (ranks.importance, "importance"), (ranks.fisher, "fisher"),
                         (ranks.gora, "importance"), (ranks.gelora, "intrinsic_dimension")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"stage=measure.*gap\.measurements\.{option}=true"):
            rule(layers, budget)


def test_scalar_measurements():
    layers = [
        layer("a", weight={"stable_rank": 1.0, "effective_rank": 9.0}, importance=3.0, fisher=1.0,
              intrinsic_dimension={"input": 3.0, "output": 6.0}),
        layer("b", weight={"stable_rank": 3.0, "effective_rank": 3.0}, importance=1.0, fisher=7.0,
              intrinsic_dimension={"input": 6.0, "output": 2.0}),
    ]  # fmt: skip
    budget = Budget(total_rank=8)
    assert list(ranks.stable_rank(layers, budget).ranks.values()) == [2, 6]
    assert list(ranks.stable_rank(layers, budget, statistic="effective_rank").ranks.values()) == [6, 2]
    with pytest.raises(ValueError, match="effective_rank, got 'rank'"):
        ranks.stable_rank(layers, budget, statistic="rank")
    assert list(ranks.importance(layers, budget).ranks.values()) == [6, 2]
    assert list(ranks.fisher(layers, budget).ranks.values()) == [1, 7]
    assert list(ranks.gelora(layers).ranks.values()) == [4, 1]
    assert list(ranks.gelora(layers, Budget(total_rank=5)).ranks.values()) == [4, 1]


def test_gora_is_the_papers_formula_or_spends_the_budget():
    def records(*rows):
        return [Layer(str(i), d, d, importance=w) for i, (d, w) in enumerate(rows)]

    def given(layers, *args, **options):
        return list(ranks.gora(layers, *args, **options).ranks.values())

    alike = records((32, 3.0), (32, 1.0))
    assert given(alike, r0=4) == given(alike, Budget(total_rank=8)) == given(alike, Budget(parameters=512)) == [6, 2]
    uneven = records((32, 1.0), (8, 1.0))  # costs 64 and 16: r ∝ 1/8 and 1/4
    assert given(uneven, r0=4) == [3, 6]  # .5 (8 + 4) 4 / 8 and / 4
    assert given(uneven, Budget(parameters=4 * 80)) == [3, 8]  # 3.3 and 6.7, and what is left to the cheaper
    skewed = records((32, 1e6), (32, 1.0), (32, 1.0), (32, 1.0), (32, 0.0), (32, 1e-9))
    assert given(skewed, r0=4) == [16, 2, 2, 2, 2, 2]  # 24 before the bounds, r0 / 2 and 4 r0
    assert given(skewed, Budget(mean_rank=4)) == [14, 2, 2, 2, 2, 2]
    assert given(skewed, Budget(mean_rank=4), most=2) == [8, 4, 4, 4, 2, 2]  # what the cap leaves goes by weight
    assert given(skewed, Budget(mean_rank=4, r_max=3)) == [3] * 6
    assert given(skewed, Budget(mean_rank=1)) == [1] * 6  # half of one is no rank
    assert given(records((32, 0.0), (32, 0.0)), Budget(mean_rank=3)) == [3, 3]
    assert given(records((4, 1.0), (4, 3.0)), r0=3) == [2, 4]  # at most the full rank
    for options, match in (
        ({"least": 2}, "least <= 1"),
        ({"most": 0.5}, "1 <= most"),
        ({"r0": 0}, "rank.r0"),
        ({}, "r0"),
    ):
        with pytest.raises(ValueError, match=match):
            ranks.gora(alike, **options)


gaps = st.lists(st.floats(-1, 100, allow_nan=False), min_size=1, max_size=8)
widths = st.lists(st.integers(1, 90), min_size=1, max_size=8)


@settings(max_examples=12, deadline=None)
@given(gaps, widths, st.integers(0, 4000), st.integers(0, 2), st.sampled_from([None, 3, 17]), st.booleans())
def test_budgets_are_kept_and_used(values, sizes, amount, r_min, r_max, in_parameters):
    layers = layers_of(values, sizes)
    budget = Budget(**{"parameters" if in_parameters else "total_rank": amount}, r_min=r_min, r_max=r_max)
    try:
        _, high = budget.bounds(layers)
    except ValueError:
        return  # r_min alone is too much
    costs = budget.unit_costs(layers)
    for rule in (ranks.uniform, *GAP_RULES):
        plan = rule(layers, budget).check(layers)
        left = budget.allowed(layers) - budget.used(plan, layers)
        affordable = [c <= left and plan[x.name] < top for x, c, top in zip(layers, costs, high, strict=True)]
        assert left >= 0
        assert spent(plan, layers, budget) >= 0.99 or not any(affordable)
        assert all(min(r_min, top) <= plan[x.name] <= top for x, top in zip(layers, high, strict=True))
        assert plan == rule(layers, budget)


# Shares that differ by less than 1e-9 of a rank are a tie, which goes to the earlier layer.
FINE = st.integers(0, 10_000_000).map(lambda n: n / 1_000_000)


@settings(max_examples=12, deadline=None)
@given(st.lists(FINE, min_size=2, max_size=8), FINE, st.integers(0, 120))
def test_more_gap_never_means_less_rank(values, more, amount):
    budget = Budget(total_rank=amount)
    for rule in (ranks.proportional, ranks.ibp_count):
        before = rule(layers_of(values), budget)
        order = sorted(range(len(values)), key=lambda i: values[i])
        sorted_ranks = [before[f"l{i}"] for i in order]
        strict = [values[i] for i in order]
        assert all(
            a <= b or x == y for a, b, x, y in zip(sorted_ranks, sorted_ranks[1:], strict, strict[1:], strict=False)
        )
        after = rule(layers_of([values[0] + more, *values[1:]]), budget)
        if rule is ranks.proportional and sum(values) > 0:
            assert after["l0"] >= before["l0"]


def test_greedy_takes_units_in_the_order_of_value_per_cost():
    layers = [layer("a", 10, 10), layer("b", 30, 10)]  # costs 20 and 40
    values = [[9.0, 1.0], [16.0, 12.0, 0.1]]
    # per parameter: a .45 .05, b .40 .30 .0025
    assert greedy(layers, Budget(parameters=20), values) == {"a": 1, "b": 0}
    assert greedy(layers, Budget(parameters=60), values) == {"a": 1, "b": 1}
    assert greedy(layers, Budget(parameters=100), values) == {"a": 1, "b": 2}
    assert greedy(layers, Budget(total_rank=2), values) == {"a": 0, "b": 2}
    assert greedy(layers, Budget(total_rank=9), values) == {"a": 5, "b": 4}  # beyond the list: evenly
    # A value that rises is cut to what came before it.
    assert greedy(layers, Budget(total_rank=1), [[1.0, 99.0], [2.0]]) == {"a": 0, "b": 1}


NAMES = [f"layers.{s}.blocks.{i}.{kind}" for s in (0, 1) for i in (0, 1) for kind in ("attn.qkv.q", "mlp.fc1")]


@pytest.mark.parametrize(
    ("by", "means"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("block", [0.5, 0.5, 2.5, 2.5, 4.5, 4.5, 6.5, 6.5]),
        ("stage", [1.5] * 4 + [5.5] * 4),
        ("module", [3, 4] * 4),
    ],
)
def test_a_group_shares_its_mean(by, means):
    layers = [
        layer(name, value=float(i), p=(i + 1) / 10, importance=2.0 * i,
              weight={"stable_rank": 3.0 * i, "effective_rank": 9.0}, intrinsic_dimension={"input": i, "output": i + 1},
              gradient={"singular_values": [float(i)], "null": 0.1 * i, "energy": 1.0}) for i, name in enumerate(NAMES)
    ]  # fmt: skip
    found = ranks.averaged(layers, by)
    assert [x.gap["mmd"].value for x in found] == means
    assert [x.importance for x in found] == pytest.approx([2 * m for m in means])
    assert [x.weight.stable_rank for x in found] == pytest.approx([3 * m for m in means])
    assert [x.intrinsic_dimension.output for x in found] == pytest.approx([m + 1 for m in means])
    for own, shared in zip(layers, found, strict=True):
        assert (shared.name, shared.cost) == (own.name, own.cost)
        assert shared.spectra == own.spectra
        same = [x.gap["mmd"].p for x, y in zip(layers, found, strict=True) if y.gap == shared.gap]
        assert shared.gap["mmd"].p == min(same)
    plan = ranks.proportional(found, Budget(total_rank=56))
    for mean, x in zip(means, found, strict=True):
        assert abs(plan[x.name] - 56 * mean / sum(means)) <= 1


def test_groups_of_layers_outside_blocks_and_of_missing_numbers():
    layers = [layer("layers.1.downsample.reduction", value=5.0), *(layer(name, value=1.0) for name in NAMES)]
    assert [x.gap["mmd"].value for x in ranks.averaged(layers, "block")] == [5.0] + [1.0] * 8
    layers = [Layer("blocks.0.attn.qkv", 4, 4, {"mmd": Gap(2.0), "sliced": Gap(1.0)}, fisher=1.0),
              Layer("blocks.0.mlp.fc1", 4, 4, {"mmd": Gap(4.0, p=0.1)})]  # fmt: skip
    found = ranks.averaged(layers, "block")
    assert found[0].gap == found[1].gap == {"mmd": Gap(3.0)}
    with pytest.raises(ValueError, match="'mmd'"):
        ranks.proportional(found, Budget(total_rank=2), p_max=0.05)
    with pytest.raises(ValueError, match="fisher"):
        ranks.fisher(found, Budget(total_rank=2))
    with pytest.raises(ValueError, match="stages"):
        ranks.averaged(layers, "stage")
    with pytest.raises(ValueError, match=r"layers\.group"):
        ranks.averaged(layers, "depth")
