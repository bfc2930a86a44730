"""orca_rank.measure: any model and any batches, the figures of stage=measure, and a model that is left as it was."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import orca_rank as orca
from orca_rank.api.measure import METRICS
from orca_rank.artifacts.provenance import plain
from orca_rank.build import build
from orca_rank.distances import mmd
from orca_rank.measuring.records import Layer
from orca_rank.stages import measure as stage
from orca_rank.stages.setup import build_model, ready, resolve_backbone, source_side

timm = pytest.importorskip("timm")

FEW = {"splits": 2, "bootstrap": 4, "permutations": 19}
SWIN = {"window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
TIMM = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
    "vit": ("vit_tiny_patch16_224", VIT),
    "beit": ("beit_base_patch16_224", VIT),
}
NEAR = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FAR = 0.5 * torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1)) + 1
LABELS = torch.arange(24) % 3


def timm_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    name, options = TIMM[family]
    return timm.create_model(name, img_size=32, num_classes=3, **options)


class Mine(nn.Module):
    """Pixels as tokens through a 1 × 1 convolution, a Linear and a readout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(3, 5, 1)
        self.fc = nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):  # (B, 3, H, W) -> (B, 4)
        z = self.fc(self.mix(x).flatten(2).mT.tanh())  # (B, H W, 4)
        return self.drop(self.norm(z.mean(1)))


@pytest.mark.parametrize("family", TIMM)
def test_timm_models_are_measured_as_they_are(family):
    gaps = orca.measure(timm_model(family), NEAR, FAR, r"attn\.(qkv|proj)$|mlp\.fc[12]$", **FEW)
    assert all(layer.gap["mmd"].value > 0 and layer.gap["sliced"].value > 0 for layer in gaps)
    assert [layer.name.rpartition("blocks.0.")[2] for layer in gaps[:4]] == [
        "attn.qkv",
        "attn.proj",
        "mlp.fc1",
        "mlp.fc2",
    ]
    assert gaps[0].d_out == 3 * gaps[0].d_in
    same = orca.measure(timm_model(family), NEAR, NEAR, r"attn\.qkv$", metrics=["mmd"], **FEW)
    assert max(same.values().values()) < 0


def test_the_figures_are_those_of_the_stage(composed, tmp_path):
    config = composed(
        "stage=measure", "data=digits", "data.channels=1", "source=digits", "backbone=swin_demo",
        "backbone.pretrained=false", "gap.measurements.ot_map=true", "gap.samples=24", "gap.bootstrap=4",
        "gap.permutations=9", "gap.splits=2", "gap.tokens=96", "gap.null_splits=3", "embedder.aligned=false",
        r"layers.target='blocks\.0\.attn\.qkv$'", "rank=uniform",
    )  # fmt: skip
    stage.run(config)
    path = tmp_path / "runs" / "default" / "measure" / "layers.json"
    written = [Layer.from_dict(record) for record in json.loads(path.read_text())["layers"]]
    source, target = (ready(node, batch_size=32) for node in (config.source, config.data))
    gaps = orca.measure(
        source_side(resolve_backbone(config), 0, source),
        source.train_dataloader(),
        target.train_dataloader(),
        r"^body\..*blocks\.0\.attn\.qkv$",
        target_model=build_model(config, target.task),
        measurements=["weight", "ot_map"],
        qkv="separate",
        samples=24,
        splits=2,
        bootstrap=4,
        permutations=9,
        tokens=96,
        null_splits=3,
    )
    assert [replace(layer, name=layer.name.removeprefix("body.")) for layer in gaps] == written
    assert orca.Gaps.load(path).layers == tuple(written)


def test_named_metrics_are_those_of_the_config(composed):
    def known(metric):
        return getattr(metric, "func", metric), dict(getattr(metric, "keywords", {}))

    expected = {name: build(node) for name, node in composed("gap=all").gap.metrics.items()}
    assert {name: known(metric) for name, metric in METRICS.items()} == {n: known(m) for n, m in expected.items()}
    assert plain(composed("gap=default").gap.metrics).keys() == {"mmd", "sliced"}


def test_every_form_of_batches_gives_the_same():
    x, y = FAR.numpy(), LABELS.numpy()
    halves = [(FAR[:10], LABELS[:10]), (FAR[10:], LABELS[10:])]
    forms = {
        "tensor": FAR,
        "array": x,
        "float64": x.astype("float64"),
        "tuples": halves,
        "lists of x": [[FAR[:10]], [FAR[10:]]],
        "x": [FAR[:10], FAR[10:]],
        "triples": ((a, b, "meta") for a, b in halves),
        "dicts": [{"x": a, "label": b, "name": "left out"} for a, b in halves],
        "images": [{"image": a, "mask": None} for a, _ in halves],
        "arrays": [(x[:10], y[:10]), (x[10:], y[10:])],
        "loader": DataLoader(TensorDataset(FAR, LABELS), 7),
        "an empty batch": [FAR[:10], FAR[:0], FAR[10:]],
    }
    model = Mine()
    more = DataLoader(TensorDataset(torch.cat([FAR, NEAR]), LABELS.repeat(2)), 10)
    forms["more than is asked for"] = more
    expected = orca.measure(model, NEAR, FAR, "fc|mix", metrics=["mmd"], **FEW).values()
    for name, form in forms.items():
        found = orca.measure(model, NEAR, form, "fc|mix", metrics=["mmd"], samples=24, **FEW)
        assert found.values() == pytest.approx(expected, rel=1e-4), name


def test_labels_are_used_where_something_asks_for_them():
    loaders = [[(NEAR, LABELS)], [{"x": FAR, "labels": LABELS}]]
    none = {"bootstrap": 0, "permutations": 0}
    found = orca.measure(Mine(), *loaders, "fc", metrics=["otdd", "mmd"], slow=none, **FEW)
    assert found[0].gap["otdd"].value > 0
    assert found[0].gap["otdd"].p is None
    with pytest.raises(ValueError, match=r"gap\.metrics\.otdd need labels, which the source data do not have"):
        orca.measure(Mine(), NEAR, loaders[1], "fc", metrics=["otdd"])
    fields = [(FAR, FAR[:, :1])]
    found = orca.measure(Mine(), [(NEAR, LABELS)], fields, "fc", clusters=2, metrics=["otdd"], slow=none, **FEW)
    assert found[0].gap["otdd"].value > 0


def test_gradients_of_a_loss():
    model = Mine()
    options = {"measurements": ["gradient", "importance", "fisher"], **FEW}
    gaps = orca.measure(
        model, NEAR, [(FAR, LABELS)], "fc|mix", loss=lambda output, y: F.cross_entropy(output, y), **options
    )
    model.eval()
    F.cross_entropy(model(FAR), LABELS).backward()
    for name in ("fc", "mix"):
        weight = model.get_parameter(f"{name}.weight").detach().flatten(1)
        gradient = model.get_parameter(f"{name}.weight").grad.flatten(1)
        assert gaps[name].importance == pytest.approx(float((weight * gradient).abs().mean()), rel=1e-4)
        first = torch.linalg.svdvals(gradient)[0]
        assert gaps[name].spectra["gradient"].singular_values[0] == pytest.approx(float(first), rel=1e-4)
    assert len(orca.plan(gaps, "importance", total_rank=4)) == 2
    with pytest.raises(ValueError, match="only stage=measure keeps"):
        orca.measure(model, NEAR, [(FAR, LABELS)], "fc", measurements=["mean_gradient"], **FEW)
    with pytest.raises(ValueError, match="needs a loss"):
        orca.measure(model, NEAR, [(FAR, LABELS)], "fc", **options)
    with pytest.raises(ValueError, match="need labels"):
        orca.measure(model, NEAR, FAR, "fc", loss=F.cross_entropy, **options)
    with pytest.raises(ValueError, match="second pass"):
        orca.measure(model, NEAR, iter([(FAR, LABELS)]), "fc", loss=F.cross_entropy, **options)


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was_found(broken):
    model = Mine().train()
    model.norm.eval()
    model.fc.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    draws = torch.get_rng_state()
    if broken:
        with pytest.raises(ValueError, match=r"does not take the target batches, x \(16, 1, 32, 32\): RuntimeError"):
            orca.measure(model, NEAR, FAR[:, :1], "fc")
    else:
        orca.measure(model, NEAR, FAR, "fc", **FEW)
    assert [m.training for m in model.modules()] == [True, True, True, False, True]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), draws)
    model(NEAR).sum().backward()  # what the model keeps of a pass can be trained with


class TokensFirst(nn.Module):
    """As nn.TransformerEncoderLayer without batch_first: (T, B, d), where an image is not the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(3, 1, 8)

    def forward(self, x):
        return self.block(x.flatten(2).permute(2, 0, 1))


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        z = x.mean((2, 3))
        return self.fc(z + torch.arange(len(z))[:, None])


@pytest.mark.parametrize(("model", "layer"), [(TokensFirst(), r"block\.linear1"), (Mixing(), "fc")])
def test_images_must_pass_by_themselves(model, layer):
    with pytest.raises(ValueError, match=rf"what reaches {layer} from a source image depends on the images beside it"):
        orca.measure(model, NEAR, FAR, "linear1|fc")


class Unused(Mine):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"source": []}, ValueError, "the source loader gave no images"),
        ({"target": iter(())}, ValueError, "the target loader gave no images"),
        ({"target": DataLoader(TensorDataset(FAR[:4]))}, ValueError, "at least 8 images a side, got 24 and 4"),
        ({"target": TensorDataset(FAR)}, TypeError, "wrap it in a torch DataLoader"),
        ({"target": 3}, TypeError, "target is a int: expected a loader"),
        ({"target": [["a", "b"]]}, TypeError, "a target batch holds a str: expected a tensor or array x"),
        ({"target": [(FAR, LABELS[:3])]}, ValueError, r"different lengths: \[3, 24\]"),
        ({"target": [{"labels": LABELS}]}, TypeError, "a target batch holds a dict"),
        ({"layers": "qkv"}, ValueError, r"layers='qkv' matches none .* 3 Linear .*example mix, fc, spare"),
        ({"layers": "("}, ValueError, "layers is not a regular expression"),
        ({"layers": "spare"}, ValueError, "spare took no part"),
        ({"qkv": "both"}, ValueError, "qkv must be 'fused' or 'separate'"),
        ({"metrics": ["mmdd"]}, ValueError, "metrics has mmdd; there are mmd, sliced"),
        ({"metrics": "mmd"}, ValueError, "lists of names"),
        ({"measurements": ["gradients"]}, ValueError, "gap.measurements has gradients"),
        ({"samples": 3}, ValueError, "gap.samples must be an integer of at least 8, received 3"),
        ({"projections": 3}, ValueError, "gap has no option projections"),
        ({"target": FAR * torch.nan}, ValueError, "NaN or infinity"),
        ({"target_model": nn.Linear(3, 4)}, ValueError, "target_model has no layer mix"),
        ({"model": Unused().to("meta")}, ValueError, "meta device"),
    ],
)
def test_one_clear_error(change, error, words):
    given = {"model": Unused(), "source": NEAR, "target": FAR, "layers": "mix|fc", **change}
    with pytest.raises(error, match=words):
        orca.measure(**given)


def test_a_target_model_has_an_embedder_of_its_own():
    model, other = (nn.Sequential(nn.Conv2d(channels, 5, 1), nn.Flatten(2), nn.Linear(1024, 4)) for channels in (3, 1))
    other[2] = model[2]
    gaps = orca.measure(model, NEAR, FAR[:, :1], "^2$", target_model=other, **FEW)
    assert gaps.values("mmd").keys() == {"2"}
    with pytest.raises(ValueError, match=r"target_model has no layer 0 of shape \(5, 3, 1, 1\)"):
        orca.measure(model, NEAR, FAR[:, :1], "^0$", target_model=other)


def test_a_metric_of_ones_own_and_variants():
    def shift(x, y):
        return (x.mean(0) - y.mean(0)).square().sum()

    gaps = orca.measure(Mine(), NEAR, FAR, "fc", metrics={"shift": shift}, variants=["whitened"], seed=3, **FEW)
    assert gaps.metrics == ["shift", "shift_whitened"]
    assert gaps[0].gap["shift"].value > 0
    assert orca.measure(Mine(), NEAR, FAR, "fc", metrics={"mmd": mmd}, **FEW).metrics == ["mmd"]


def test_gaps_are_a_table_and_a_sequence(tmp_path):
    gaps = orca.measure(Mine(), NEAR, FAR, "mix|fc", **FEW)
    assert (len(gaps), gaps["fc"], [*gaps]) == (2, gaps[1], [gaps[0], gaps[-1]])
    assert gaps[:1] == (gaps[0],)
    lines = repr(gaps).splitlines()
    assert lines[0].split() == ["layer", "d_in", "×", "d_out", "mmd", "95", "%", "p", "sliced"]
    value = gaps[0].gap["mmd"]
    assert lines[1].split()[:5] == ["mix", "3", "×", "5", f"{value.value:.3g}" + "*" * (value.p_family < 0.05)]
    assert "2 layers, 24 source and 24 target images" in lines[3]
    with pytest.raises(KeyError, match="no layer 'fc2' was measured; there are mix, fc"):
        gaps["fc2"]
    with pytest.raises(KeyError, match="'otdd' was not measured; there are mmd, sliced"):
        gaps.values("otdd")
    figure = gaps.plot()
    assert isinstance(figure, Figure)
    assert figure._repr_png_().startswith(b"\x89PNG")
    gaps.save(tmp_path / "layers.json")
    again = orca.Gaps.load(tmp_path / "layers.json")
    assert (again, again.source_images, repr(again)) == (gaps, 24, repr(gaps))
    assert orca.plan(tmp_path / "layers.json", total_rank=4) == orca.plan(gaps, total_rank=4)
    assert np.isfinite(list(gaps.values().values())).all()
