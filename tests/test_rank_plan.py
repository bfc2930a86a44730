"""A rank plan in files of a run, and on paper."""

import json

from orca_rank.ranks import Budget, Layer, RankPlan
from orca_rank.stages import plan


def test_a_plan_of_a_run_is_a_rank_plan(composed, tmp_path):
    plan.run(composed("stage=plan", "rank=uniform", "rank.r=3", "budget.r_max=3", "run=a"))
    plan.run(composed("stage=plan", "rank=uniform", "budget.mean_rank=2", "run=b"))
    for run, rank in (("a", 3), ("b", 2)):
        path = tmp_path / "runs" / run / "plan" / "plan.json"
        written = json.loads(path.read_text())
        found = RankPlan.load(path)
        assert found == RankPlan.from_json(path.read_text()) == RankPlan.from_dict(written)
        assert found.ranks == {row["name"]: row["rank"] for row in written["layers"]}
        assert set(found.ranks.values()) == {rank}
        assert (found.rule, found.budget) == ("uniform", None if run == "a" else Budget(mean_rank=2))
        layers = [Layer.from_dict(row) for row in written["layers"]]
        assert found.check(layers).parameters(layers) == written["trainable_parameters"]["adapter"]
        assert f"{written['trainable_parameters']['adapter']:,} parameters" in repr(found)
        again = tmp_path / "ranks.json"
        again.write_text(found.to_json())
        assert RankPlan.load(again) == found == RankPlan.load(str(path))


def test_a_plan_above_full_rank_on_purpose_stays_one(tmp_path):
    rows = [{"name": "l0", "d_in": 4, "d_out": 4, "rank": 9}]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"schema": 1, "layers": rows, "options": {"allow_above_full": True}}))
    assert RankPlan.load(path).check([Layer("l0", 4, 4)])["l0"] == 9


def test_a_plan_prints_itself():
    plan = RankPlan({"a.qkv.q": 1, "a.qkv.k": 0, "a.qkv.v": 2, "b": 0}, "mine")
    lines = repr(plan).splitlines()
    assert [line.split() for line in lines[:3]] == [["layer", "rank"], ["a.qkv", "(q", "k", "v)", "1", "0", "2"],
                                                    ["b", "0"]]  # fmt: skip
    assert lines[3] == "rule mine: 2 of 4 layers adapted, total rank 3"
    shaped = RankPlan(plan.ranks, shapes={"a.qkv.q": (4, 4), "a.qkv.k": (4, 4), "a.qkv.v": (4, 4), "b": (4, 10)})
    assert repr(shaped).endswith("rule given: 2 of 4 layers adapted, total rank 3, 24 parameters")
    assert repr(RankPlan({})) == "layer  rank\nrule given: 0 of 0 layers adapted, total rank 0"
