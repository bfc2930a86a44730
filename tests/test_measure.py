"""stage=measure on small data: what it writes, that it measures what it should, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from orca_rank.artifacts.files import write_tensors
from orca_rank.artifacts.provenance import plain
from orca_rank.distances import mmd, sliced_wasserstein
from orca_rank.measuring.layers import NULLED, agreement
from orca_rank.measuring.options import GapOptions
from orca_rank.measuring.records import SPECTRA, Gap, Layer, Spectrum, WeightRank
from orca_rank.stages import measure, plan

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


def layers_in(folder):
    return [Layer.from_dict(record) for record in read(folder / "layers.json")["layers"]]


@pytest.fixture
def planned(composed, tmp_path):
    """planned("override", ...) runs stage=plan on what was measured and returns its ranks."""

    def go(*overrides):
        config = composed(*SMALL, "stage=plan", "plan.rules=[]", *overrides)
        plan.run(config)
        rows = read(tmp_path / "runs" / config.run / "plan" / "plan.json")["layers"]
        return {row["name"]: row["rank"] for row in rows}

    return go


def test_gaps_are_written_and_a_plan_follows(measured, planned, capsys):
    folder = measured("rank=proportional", "budget.mean_rank=3")
    printed = " ".join(capsys.readouterr().out.split())
    assert "no aligned embedder" in printed
    assert "stage=plan shows the ranks" in printed
    found, layers = read(folder / "layers.json"), layers_in(folder)
    assert [layer.name.rpartition(".")[2] for layer in layers[:4]] == ["q", "k", "v", "fc1"]
    for layer in layers:
        for gap in (layer.gap["mmd"], layer.gap["sliced"]):
            assert gap.p >= 0.1 - 1e-9  # 9 permutations
            assert gap.p_family >= gap.p - 1e-9 or gap.p_family == pytest.approx(0.1)
        assert layer.weight.stable_rank > 1
    assert layers[0].gap == layers[1].gap == layers[2].gap  # q, k and v have one input
    assert not list(folder.glob("ranks.json"))
    ranks = planned("rank=proportional", "budget.mean_rank=3")
    assert sum(ranks.values()) == 3 * len(layers)
    assert found["agreement"]["depth"]["depth"] == 1.0


@pytest.mark.slow
def test_a_second_run_measures_nothing(measured, planned, capsys):
    folder = measured("rank=proportional")
    stamp = (folder / "layers.json").stat().st_mtime_ns
    measured("rank=uniform", "rank.r=2")
    assert "measure is done" in capsys.readouterr().out
    assert (folder / "layers.json").stat().st_mtime_ns == stamp
    assert set(planned("rank=uniform", "rank.r=2").values()) == {2}
    measured("rank=proportional", "layers.group=module", "budget.mean_rank=3")
    assert "measure is done" in capsys.readouterr().out
    ranks = planned("rank=proportional", "layers.group=module", "budget.mean_rank=3")
    hidden = [rank for name, rank in ranks.items() if name.endswith("mlp.fc1")]
    assert len(hidden) == 3
    assert max(hidden) - min(hidden) <= 1
    with pytest.raises(ValueError, match=r"gap\.measurements\.ot_map=true"):
        measured("rank=ot_map")
    with pytest.raises(ValueError, match="force=true"):
        measured("gap.splits=3")
    measured("gap.splits=3", "force=true")
    assert (folder / "layers.json").stat().st_mtime_ns > stamp


def test_an_interrupted_run_goes_on_to_the_same_result(measured, monkeypatch):
    options = ("gap=spectra", "gap.samples=24", "gap.tokens=96", "gap.null_splits=3", "gap.sign_draws=3",
               "+data@measure.compare.near=digits_near")  # fmt: skip
    whole = measured(*options, "run=whole")
    places = {"side": measure.Pass, "gradients": measure.Pass, "layer_gaps": measure, "measurements": measure}
    done = dict.fromkeys(places, 0)

    def counted(name, original, allowed):
        def call(*args):
            if allowed is not None and done[name] == allowed:
                raise KeyboardInterrupt
            done[name] += 1
            return original(*args)

        return call

    originals = {name: getattr(place, name) for name, place in places.items()}
    for stop, allowed in (("side", 1), ("gradients", 0), ("layer_gaps", 1), ("measurements", 0), ("layer_gaps", 3)):
        for name, original in originals.items():
            monkeypatch.setattr(places[name], name, counted(name, original, allowed if name == stop else None))
        with pytest.raises(KeyboardInterrupt):
            measured(*options, "run=torn")
    for name, original in originals.items():
        monkeypatch.setattr(places[name], name, counted(name, original, None))
    torn = measured(*options, "run=torn")
    assert done == {"side": 3, "gradients": 1, "layer_gaps": 4, "measurements": 2}  # two metrics, two targets
    assert not (torn / "unfinished").exists()
    assert read(torn / "layers.json")["layers"] == read(whole / "layers.json")["layers"]
    assert read(torn / "compare" / "near.json") == read(whole / "compare" / "near.json")


def test_everything_at_once(measured):
    folder = measured("gap=spectra", "gap.samples=24", "gap.variants=[standardised,whitened]", "rank=gradient",
                      "gap.tokens=96", "gap.null_splits=3", "gap.sign_draws=3",
                      "gap.measurements.mean_gradient=true", "gap.measurements.whitened_gradient=true")  # fmt: skip
    layers = layers_in(folder)
    directions = load_file(folder / "directions.safetensors")
    for layer in layers:
        assert set(layer.gap) == {m + v for m in ("mmd", "sliced") for v in ("", "_standardised", "_whitened")}
        for kind in SPECTRA:
            values = layer.spectra[kind].singular_values
            assert values == tuple(sorted(values, reverse=True))
            assert directions[f"{kind}/{layer.name}.A"].shape[1] == layer.d_in
        for kind in NULLED:
            found = layer.spectra[kind]
            assert found.rank == sum(value > found.null for value in found.singular_values)
            assert directions[f"{kind}/{layer.name}.B"].shape[0] == layer.d_out
        assert layer.spectra["activation"].rank is None
        assert layer.importance > 0
        mean = directions[f"mean_gradient/{layer.name}.G"]
        assert mean.shape == (layer.d_out, layer.d_in)
        first = layer.spectra["gradient"].singular_values[0]
        assert float(torch.linalg.matrix_norm(mean, 2)) == pytest.approx(first, rel=1e-3)
        assert layer.fisher > 0
        assert layer.intrinsic_dimension.input > 0
    blocks = {layer.name.partition(".attn")[0].partition(".mlp")[0]: layer.intrinsic_dimension for layer in layers}
    assert len(blocks) < len({layer.name for layer in layers})
    assert all(layer.intrinsic_dimension == blocks[name] for name in blocks for layer in layers if name in layer.name)


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


def test_the_options_of_gap_have_the_defaults_of_the_config(composed):
    node = plain(composed().gap)
    metrics = {"mmd": mmd, "sliced": sliced_wasserstein}
    assert GapOptions.from_dict(node, metrics) == GapOptions(metrics)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"samples": True}, r"gap\.samples must be an integer of at least 8, received True"),
        ({"samples": 64.0}, r"gap\.samples must be an integer of at least 8, received 64\.0"),
        ({"samples": None}, r"gap\.samples .* received None"),
        ({"splits": 0}, r"gap\.splits must be an integer of at least 1, received 0"),
        ({"bootstrap": "10"}, r"gap\.bootstrap must be an integer of at least 0, received '10'"),
        ({"permutations": -1}, r"gap\.permutations"),
        ({"batch_size": 0}, r"gap\.batch_size must be an integer of at least 1, received 0"),
        ({"slow": {"bootstrap": 1, "permutations": 0.5}}, r"gap\.slow\.permutations .* received 0\.5"),
        ({"slow": {"bootstrap": 1}}, r"gap\.slow must hold bootstrap and permutations"),
        ({"slow": 3}, r"gap\.slow must be an object of options, received 3"),
        ({"variants": "whitened"}, r"gap\.variants must be a list among .*, received 'whitened'"),
        ({"measurements": {"weight": 1}}, r"gap\.measurements\.weight must be true or false, received 1"),
        ({"measurements": {"ot_map": True}, "tokens": 1}, r"gap\.tokens must be an integer of at least 2"),
        ({"measurements": {"ot_map": True}, "null_splits": 1}, r"gap\.null_splits must be an integer of at least 2"),
        ({"measurements": {"gradient": True}, "sign_draws": 1}, r"gap\.sign_draws must be an integer of at least 2"),
        ({"sample": 64}, r"gap has no option sample; there are metrics, samples"),
    ],
)
def test_a_bad_option_of_gap_says_what_it_holds_and_may_hold(option, message):
    with pytest.raises(ValueError, match=message):
        GapOptions.from_dict(option, {"mmd": mmd})
    with pytest.raises(ValueError, match=r"gap\.metrics is empty"):
        GapOptions({})


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


def test_agreement_is_spearmans():
    layers = [
        Layer(str(i), 4, 4, {"mmd": Gap(value)}, WeightRank(2.0, 2.0), fisher=float(-i),
              spectra={"gradient": Spectrum((), 1.0, 1.0, i * i)}) for i, value in enumerate([0.1, 0.5, 0.4, 3.0])
    ]  # fmt: skip
    found = agreement(layers)
    assert found["depth"]["mmd gap"] == 0.8
    assert found["depth"]["fisher"] == -1
    assert found["fisher"]["gradient rank"] == -1
    assert "stable rank" not in found  # constant: no order


@pytest.mark.parametrize("group", ["block", "module"])
def test_a_vit_is_measured(measured, planned, group):
    vit = ("backbone=vit_small", "backbone.pretrained=false", "+backbone.options.img_size=16",
           "+backbone.options.patch_size=8", "+backbone.options.embed_dim=24", "+backbone.options.depth=2",
           "+backbone.options.num_heads=2")  # fmt: skip
    few = ("gap=spectra", "gap.samples=24", "gap.tokens=96", "gap.null_splits=3", "gap.sign_draws=3")
    folder = measured(*vit, *few, r"layers.target='(attn\.qkv|mlp\.fc1)$'", "rank=importance", f"layers.group={group}")
    layers = layers_in(folder)
    parts = ("attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "mlp.fc1")
    assert [layer.name for layer in layers] == [f"blocks.{block}.{part}" for block in (0, 1) for part in parts]
    assert all(layer.spectra["gradient"].energy > 0 for layer in layers)
    options = (r"layers.target='(attn\.qkv|mlp\.fc1)$'", "rank=importance", f"layers.group={group}")
    ranks = planned(*vit, *options)
    assert sum(ranks.values()) == 4 * len(layers)
    first, last = (np.array([ranks[f"blocks.{block}.{part}"] for part in parts]) for block in (0, 1))
    if group == "module":
        assert abs(first - last).max() <= 1
    else:
        assert np.ptp(first) <= 1
        assert np.ptp(last) <= 1
    with pytest.raises(ValueError, match=r"layers\.group=stage"):
        measured(*vit, *few, r"layers.target='(attn\.qkv|mlp\.fc1)$'", "rank=importance", "layers.group=stage")


def test_data_without_targets_are_measured_where_nothing_asks_for_them(measured, tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 3, 8, 8)).astype("float32")
    np.savez(tmp_path / "bare.npz", x=x)
    files = (f"data.root={tmp_path}", "data=arrays", "data.train=bare.npz", "data.y=null", "gap.bootstrap=0")
    found = read(measured(*files, "gap.samples=100", "gap.permutations=99") / "layers.json")
    assert found["images"]["target"] == 40  # none of them is held out
    assert all(layer["gap"]["mmd"]["p_family"] < 0.05 for layer in found["layers"])
    source = ("source=arrays", f"source.root={tmp_path}", "source.y=null", "source.train=bare.npz")
    for options, words in (
        (("gap.measurements.gradient=true",), r"gap\.measurements\.gradient need labels.*target data"),
        ((*source, "gap=all"), r"gap\.metrics\.otdd, gap\.measurements\.gradient.* the source and the target data"),
    ):
        with pytest.raises(ValueError, match=words):
            measured(*files, *options, "run=asked")
