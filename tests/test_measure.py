"""stage=measure on small data: what it writes, that it measures what it should, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from orca_rank.artifacts.files import write_tensors
from orca_rank.measuring.layers import agreement, classes
from orca_rank.ranks import Layer, RankPlan
from orca_rank.stages import measure

SMALL = (
    "stage=measure",
    "data=digits",
    "source=digits",
    "backbone=swin_demo",
    "backbone.pretrained=false",
    "budget.mean_rank=4",
    "budget.parameters=null",
    "gap.samples=24",
    "gap.bootstrap=4",
    "gap.permutations=9",
    "gap.splits=2",
    "gap.slow.bootstrap=2",
    r"layers.target='blocks\.0\.(attn\.qkv|mlp\.fc1)$'",
)


@pytest.fixture
def measured(composed, tmp_path):
    """measured("override", ...) runs the stage and returns the folder that it wrote."""

    def go(*overrides):
        config = composed(*SMALL, *overrides)
        config.measure.compare = {name: node for name, node in config.measure.compare.items() if name == "near"}
        measure.run(config)
        return tmp_path / "runs" / config.run / "measure"

    return go


def read(path):
    return json.loads(path.read_text())


def test_gaps_and_plan_are_written(measured, capsys):
    folder = measured("rank=proportional", "budget.mean_rank=3")
    printed = capsys.readouterr().out
    assert "no aligned embedder" in printed
    assert "mean rank 3.00" in printed
    found = read(folder / "layers.json")
    layers = [Layer.from_dict(record) for record in found["layers"]]
    assert [layer.name.rpartition(".")[2] for layer in layers[:4]] == ["q", "k", "v", "fc1"]
    for layer in layers:
        for gap in (layer.gap["mmd"], layer.gap["sliced"]):
            assert gap["low"] <= gap["value"] <= gap["high"]
            assert 0.1 - 1e-9 <= gap["p"] <= gap["p_family"] + 0.2
        assert layer.measured["weight"]["stable_rank"] > 1
    assert layers[0].gap == layers[1].gap == layers[2].gap  # q, k and v have one input
    plan = RankPlan.from_dict({**read(folder / "ranks.json"), "schema": 1}).check(layers)
    assert plan.total_rank == 3 * len(layers)
    assert plan.measurement
    assert found["agreement"]["depth"]["depth"] == 1.0


def test_a_second_run_measures_nothing_and_makes_the_plan_anew(measured, capsys):
    folder = measured("rank=proportional")
    stamp = (folder / "layers.json").stat().st_mtime_ns
    measured("rank=uniform", "rank.r=2")
    assert "measure is done" in capsys.readouterr().out
    assert (folder / "layers.json").stat().st_mtime_ns == stamp
    assert set(read(folder / "ranks.json")["ranks"].values()) == {2}
    measured("rank=proportional", "layers.group=module", "budget.mean_rank=3")
    assert "measure is done" in capsys.readouterr().out
    hidden = [rank for name, rank in read(folder / "ranks.json")["ranks"].items() if name.endswith("mlp.fc1")]
    assert len(hidden) == 3
    assert max(hidden) - min(hidden) <= 1
    with pytest.raises(ValueError, match="force=true"):
        measured("gap.splits=3")
    measured("gap.splits=3", "force=true")
    assert (folder / "layers.json").stat().st_mtime_ns > stamp


def test_an_interrupted_run_goes_on_to_the_same_result(measured, monkeypatch):
    options = ("gap=spectra", "gap.samples=24", "gap.tokens=96", "gap.null_splits=3", "gap.sign_draws=3",
               "+data@measure.compare.near=digits_near")  # fmt: skip
    whole = measured(*options, "run=whole")
    done = {"_pass": 0, "_gradients": 0, "gap_records": 0, "measurements": 0}

    def counted(name, original, allowed):
        def call(*args):
            if allowed is not None and done[name] == allowed:
                raise KeyboardInterrupt
            done[name] += 1
            return original(*args)

        return call

    originals = {name: getattr(measure, name) for name in done}
    for stop, allowed in (("_pass", 1), ("_gradients", 0), ("gap_records", 1), ("measurements", 0), ("gap_records", 3)):
        for name, original in originals.items():
            monkeypatch.setattr(measure, name, counted(name, original, allowed if name == stop else None))
        with pytest.raises(KeyboardInterrupt):
            measured(*options, "run=torn")
    for name, original in originals.items():
        monkeypatch.setattr(measure, name, counted(name, original, None))
    torn = measured(*options, "run=torn")
    assert done == {"_pass": 3, "_gradients": 1, "gap_records": 4, "measurements": 2}  # two metrics, two targets
    assert not (torn / "unfinished").exists()
    assert read(torn / "layers.json")["layers"] == read(whole / "layers.json")["layers"]
    assert read(torn / "compare" / "near.json") == read(whole / "compare" / "near.json")


def test_everything_at_once(measured):
    folder = measured("gap=spectra", "gap.samples=24", "gap.variants=[standardised,whitened]", "rank=gradient",
                      "gap.tokens=96", "gap.null_splits=3", "gap.sign_draws=3")  # fmt: skip
    layers = [Layer.from_dict(record) for record in read(folder / "layers.json")["layers"]]
    directions = load_file(folder / "directions.safetensors")
    for layer in layers:
        assert set(layer.gap) == {m + v for m in ("mmd", "sliced") for v in ("", "_standardised", "_whitened")}
        for kind in ("ot_map", "gradient", "activation"):
            values = layer.measured[kind]["singular_values"]
            assert values == sorted(values, reverse=True)
            assert directions[f"{kind}/{layer.name}.A"].shape[1] == layer.d_in
        for kind in ("ot_map", "gradient"):
            found = layer.measured[kind]
            assert found["rank"] == sum(value > found["null"] for value in found["singular_values"])
            assert directions[f"{kind}/{layer.name}.B"].shape[0] == layer.d_out
        assert layer.measured["importance"] > 0
        assert layer.measured["fisher"] > 0
        assert layer.measured["intrinsic_dimension"]["input"] > 0


def test_an_aligned_embedder_is_used_and_another_target_is_compared(measured, composed, tmp_path):
    plain = read(measured("run=plain") / "layers.json")
    model = measure.build_model(composed(*SMALL, "embedder.aligned=false"), measure.build(composed(*SMALL).data).task)
    state = {name: torch.randn_like(value) for name, value in model.embedder.state_dict().items()}
    write_tensors(tmp_path / "runs" / "moved" / "align" / "embedder.safetensors", state)
    folder = measured("run=moved", "+data@measure.compare.near=digits_near")
    moved = read(folder / "layers.json")
    assert moved["layers"][0]["gap"]["mmd"]["value"] > 2 * plain["layers"][0]["gap"]["mmd"]["value"]
    assert moved["config"]["embedder"]["aligned"] is True
    assert any("embedder.safetensors" in name for name in moved["inputs"])
    near = read(folder / "compare" / "near.json")
    assert near["name"] == "near"
    assert [layer["name"] for layer in near["layers"]] == [layer["name"] for layer in moved["layers"]]


def test_a_rule_without_its_measurement_fails_before_any_work(measured, tmp_path):
    for rule, option in (("ot_map", "ot_map"), ("gelora", "intrinsic_dimension")):
        with pytest.raises(ValueError, match=rf"stage=measure.*gap\.measurements\.{option}=true"):
            measured(f"rank={rule}")
    with pytest.raises(ValueError, match=r"'energy' among gap\.metrics"):
        measured("rank=proportional", "rank.metric=energy")
    with pytest.raises(ValueError, match="p-value"):
        measured("rank=proportional", "rank.p_max=0.05", "gap.permutations=0")
    for option, words in (
        ("gap.variants=[whiter]", "variants"),
        ("+gap.measurements.otmap=true", r"otmap; there are weight, ot_map"),
        ("+gap.metrics.mmd.kernel=3", r"mmd.*kernel"),
        ("gap.samples=0", r"gap\.samples must be an integer of at least 8, received 0"),
        ("gap.slow.permutations=-1", r"gap\.slow\.permutations"),
    ):
        with pytest.raises(ValueError, match=words):
            measured(option)
    assert not (tmp_path / "runs" / "default" / "measure").exists()


def test_other_contents_of_a_file_are_other_data(measured, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(40, 3, 8, 8)).astype("float32"), np.arange(40) % 2
    file = tmp_path / "mine.npz"
    arrays = ("data=arrays", f"data.root={tmp_path}", "data.train=mine.npz", "gap.bootstrap=0")
    np.savez(file, x=x, y=y)
    before = read(measured(*arrays, "run=a") / "layers.json")["layers"]
    np.savez(file, x=x * x[0], y=y)
    with pytest.raises(ValueError, match=r"contents\.data.*force=true"):
        measured(*arrays, "run=a")
    after = read(measured(*arrays, "run=b") / "layers.json")["layers"]
    assert after[0]["gap"] != before[0]["gap"]

    np.savez(file, x=x, y=y)
    with monkeypatch.context() as patched:
        patched.setattr(measure, "measurements", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            measured(*arrays, "run=c", "force=true")
    for part in (tmp_path / "runs" / "c" / "measure" / "unfinished").rglob("target.pt"):
        part.write_bytes(b"torn")
    assert read(measured(*arrays, "run=c") / "layers.json")["layers"] == before  # a damaged part is made again
    np.savez(file, x=x * x[0], y=y)
    assert read(measured(*arrays, "run=c", "force=true") / "layers.json")["layers"] == after


def test_the_same_data_on_both_sides_shows_no_gap(measured):
    folder = measured("data=digits", "data.channels=3", "gap.samples=200", "gap.permutations=99", "gap.bootstrap=0",
                      "seed=3")  # fmt: skip
    for record in read(folder / "layers.json")["layers"]:
        assert abs(record["gap"]["mmd"]["value"]) < 0.05
        assert record["gap"]["mmd"]["low"] is None


def test_classes_of_fields_are_clusters():
    fields = torch.cat([torch.zeros(10, 1, 3, 3), torch.ones(10, 1, 3, 3)]) + 0.01 * torch.randn(20, 1, 3, 3)
    found = classes(fields, seed=0, clusters=2)
    assert len(set(found[:10])) == len(set(found[10:])) == 1
    assert found[0] != found[10]
    assert classes(torch.tensor([3, 1]), 0).tolist() == [3, 1]


def test_agreement_is_spearmans():
    layers = [
        Layer(str(i), 4, 4, {"mmd": {"value": v}}, {"fisher": float(-i), "gradient": {"rank": i * i}, "weight":
              {"stable_rank": 2.0}}) for i, v in enumerate([0.1, 0.5, 0.4, 3.0])
    ]  # fmt: skip
    found = agreement(layers)
    assert found["depth"]["mmd gap"] == 0.8
    assert found["depth"]["fisher"] == -1
    assert found["fisher"]["gradient rank"] == -1
    assert "stable rank" not in found  # constant: no order


@pytest.mark.parametrize("group", ["block", "module"])
def test_a_vit_is_measured(measured, group):
    vit = ("backbone=vit_small", "backbone.pretrained=false", "+backbone.options.img_size=16",
           "+backbone.options.patch_size=8", "+backbone.options.embed_dim=24", "+backbone.options.depth=2",
           "+backbone.options.num_heads=2")  # fmt: skip
    few = ("gap=spectra", "gap.samples=24", "gap.tokens=96", "gap.null_splits=3", "gap.sign_draws=3")
    folder = measured(*vit, *few, r"layers.target='(attn\.qkv|mlp\.fc1)$'", "rank=importance", f"layers.group={group}")
    layers = [Layer.from_dict(record) for record in read(folder / "layers.json")["layers"]]
    parts = ("attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "mlp.fc1")
    assert [layer.name for layer in layers] == [f"blocks.{block}.{part}" for block in (0, 1) for part in parts]
    assert all(layer.measured["gradient"]["energy"] > 0 for layer in layers)
    plan = RankPlan.from_dict({**read(folder / "ranks.json"), "schema": 1}).check(layers)
    assert plan.total_rank == 4 * len(layers)
    first, last = (np.array([plan[f"blocks.{block}.{part}"] for part in parts]) for block in (0, 1))
    if group == "module":
        assert abs(first - last).max() <= 1
    else:
        assert np.ptp(first) <= 1
        assert np.ptp(last) <= 1
    with pytest.raises(ValueError, match=r"layers\.group=stage"):
        measured(*vit, *few, r"layers.target='(attn\.qkv|mlp\.fc1)$'", "rank=importance", "layers.group=stage")
