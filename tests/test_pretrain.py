"""Pretraining: augmentation, schedules, optimiser, moving average, and a resume that changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from orca_rank.artifacts.provenance import plain
from orca_rank.backbone import source_model
from orca_rank.data.augment import Augmentation, colour, draw_operations, mix, rectangle, soft_labels
from orca_rank.data.embedded import Embedded
from orca_rank.data.image_folder import ImageFolder, read_image
from orca_rank.data.module import EpochOrder
from orca_rank.stages.pretrain import run
from orca_rank.stages.setup import build_model, on_source
from orca_rank.task import Task
from orca_rank.training.muon import MuonAdamW, orthogonalised, parameter_groups
from orca_rank.training.pretrain import pretrain, update_average
from orca_rank.training.recipe import Recipe

STILL = Augmentation(crop_scale=(1.0, 1.0), crop_ratio=1.0, flip=False, smoothing=0.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def images(count: int = 12, size: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# augmentation


def test_augmentation_that_does_nothing_returns_the_images():
    x = images()
    assert torch.allclose(STILL.images(x, rng()), x, atol=1e-5)


def test_flip_gives_the_image_or_its_mirror():
    x = images()
    out = Augmentation(crop_scale=(1.0, 1.0), crop_ratio=1.0, flip=True).images(x, rng())
    same = [(a - b).abs().max() < 1e-5 for a, b in zip(out, x, strict=True)]
    mirrored = [(a - b.flip(-1)).abs().max() < 1e-5 for a, b in zip(out, x, strict=True)]
    assert all(s or m for s, m in zip(same, mirrored, strict=True))
    assert any(same) and any(mirrored)


def test_crops_of_a_linear_ramp_stay_inside_it_and_keep_its_direction():
    ramp = torch.linspace(0, 1, 16).expand(8, 3, 16, 16).contiguous()
    out = Augmentation(crop_scale=(0.25, 0.5), flip=False).images(ramp, rng())
    assert out.min() >= 0 and out.max() <= 1
    assert (out.diff(dim=-1) >= -1e-6).all()
    spans = (out[..., -1] - out[..., 0]).mean((1, 2))
    assert (spans < 0.85).all() and spans.std() > 0  # a crop sees part of the ramp, each another part


def test_augmentation_is_drawn_from_the_generator_alone():
    options = Augmentation(operations=2, magnitude=9, mixup=0.5, cutmix=1.0)
    first, second, other = (options.images(images(), rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_colour_operations_against_their_formulas():
    x = images(1) * 0.5
    none = dict.fromkeys(("rotate", "shear_x", "shear_y", "brightness", "contrast", "saturation"), np.zeros(1))
    assert torch.allclose(colour(x, none), x, atol=1e-6)
    assert torch.allclose(colour(x, none | {"brightness": np.full(1, 0.5)}), 1.5 * x, atol=1e-6)
    assert torch.allclose(colour(x, none | {"contrast": np.full(1, -1.0)}), x.mean().expand_as(x), atol=1e-6)
    grey = x.mean(1, keepdim=True).expand_as(x)
    assert torch.allclose(colour(x, none | {"saturation": np.full(1, -1.0)}), grey, atol=1e-6)


def test_randaugment_draws_the_number_of_operations_at_the_right_strength():
    draws = draw_operations(4000, 1, 5.0, rng())
    drawn = np.stack([values != 0 for values in draws.values()])
    assert drawn.sum(0).max() == 1
    assert abs(drawn.any(0).mean() - 6 / 7) < 0.03  # the seventh operation is the identity
    assert np.allclose(np.unique(np.abs(draws["brightness"])), [0, 0.45])


def test_label_smoothing_sums_to_one():
    y = soft_labels(torch.tensor([0, 2]), 4, 0.2)
    assert torch.allclose(y, torch.tensor([[0.85, 0.05, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05]]))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_gives_labels_the_share_of_the_pixels(kind):
    options = Augmentation(mix_probability=1.0, **{kind: 1.0})
    x = torch.arange(6.0)[:, None, None, None].expand(6, 3, 16, 16).contiguous()  # image i holds the value i
    y = soft_labels(torch.arange(6), 6, 0.0)
    for seed in range(5):
        mixed, target = mix(x, y, options, rng(seed))
        assert torch.allclose(mixed.mean((1, 2, 3)), target @ torch.arange(6.0), atol=1e-4)
        assert torch.allclose(target.sum(1), torch.ones(6), atol=1e-6)


def test_batches_are_not_mixed_when_mixing_is_off_or_not_drawn():
    x, y = images(), soft_labels(torch.arange(12), 12, 0.0)
    for options in (Augmentation(), Augmentation(mixup=1.0, mix_probability=0.0)):
        mixed, target = mix(x, y, options, rng())
        assert mixed is x and target is y


def test_cutmix_rectangles_lie_inside_the_image():
    for seed in range(50):
        top, bottom, left, right = rectangle((10, 20), rng(seed).random(), rng(seed))
        assert 0 <= top <= bottom <= 10 and 0 <= left <= right <= 20


@pytest.mark.parametrize(
    "wrong", [{"crop_scale": (0.0, 1.0)}, {"crop_ratio": 0.5}, {"smoothing": 1.0}, {"mixup": -1.0}]
)
def test_bad_augmentation_options_are_refused(wrong):
    with pytest.raises(ValueError):
        Augmentation(**wrong)


# schedule, order, average


def test_cosine_schedule_warms_up_and_ends_at_zero():
    recipe = Recipe(epochs=10, warmup_epochs=1)
    factors = [recipe.course(20).factor(step) for step in range(201)]
    assert factors[:20] == pytest.approx([(i + 1) / 21 for i in range(20)])
    assert factors[20] == 1 and factors[110] == pytest.approx(0.5) and factors[200] == pytest.approx(0)


def test_wsd_schedule_is_constant_until_the_decay_and_does_not_know_the_end_before():
    recipe = Recipe(epochs=10, schedule="wsd", warmup_epochs=1, decay_epochs=2)
    factors = [recipe.course(20).factor(step) for step in range(201)]
    assert set(factors[20:161]) == {1.0} and factors[180] == pytest.approx(0.5) and factors[200] == 0
    longer = Recipe(epochs=50, schedule="wsd", warmup_epochs=1, decay_epochs=2)
    assert factors[:161] == [longer.course(20).factor(step) for step in range(161)]


def test_an_epoch_visits_images_once_in_an_order_of_its_own():
    order = EpochOrder(10, seed=0)
    first = list(order)
    assert sorted(first) == list(range(10)) and len(order) == 10
    order.set_epoch(0)
    assert list(order) == first
    order.set_epoch(1)
    assert list(order) != first


def test_another_augmentation_may_begin_with_the_decay():
    mild, strong = Augmentation(), Augmentation(operations=2)
    recipe = Recipe(epochs=5, schedule="wsd", decay_epochs=2, augmentation=mild, decay_augmentation=strong)
    assert [recipe.augmentation_in(epoch) is strong for epoch in range(5)] == [False, False, False, True, True]
    assert Recipe(augmentation=mild).augmentation_in(29) is mild


def test_moving_average_follows_its_formula():
    network, average = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = 0.9 * average.weight.detach() + 0.1 * network.weight.detach()
    update_average(average, network, 0.9)
    assert torch.allclose(average.weight, expected, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [{"optimizer": "sgd"}, {"schedule": "step"}, {"ema": 1.0}, {"epochs": 0}, {"decay_augmentation": Augmentation()}],
)
def test_bad_recipes_are_refused(wrong):
    with pytest.raises(ValueError):
        Recipe(**wrong)


# optimiser


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_orthogonalised_keeps_the_singular_vectors_and_levels_the_values(shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(gradient, full_matrices=False)
    inner = u.T @ orthogonalised(gradient) @ v.T
    kept = s > 0.05 * s.max()
    assert ((inner.diag()[kept] > 0.6) & (inner.diag()[kept] < 1.3)).all()
    assert (inner - inner.diag().diag()).abs().max() < 1e-3


def test_groups_that_are_not_muon_follow_adamw():
    theirs, ours = nn.Linear(4, 3), nn.Linear(4, 3)
    ours.load_state_dict(theirs.state_dict())
    options = dict(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    optimizers = [torch.optim.AdamW(theirs.parameters(), **options), MuonAdamW(ours.parameters(), **options)]
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        for optimizer, network in zip(optimizers, (theirs, ours), strict=True):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
    assert torch.allclose(theirs.weight, ours.weight, atol=1e-6)


def test_a_muon_step_has_the_size_of_the_learning_rate():
    weight = nn.Parameter(torch.zeros(32, 64))
    optimizer = MuonAdamW([{"params": [weight], "muon": True}], lr=0.01, weight_decay=0.0)
    weight.grad = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert 0.7 < weight.detach().square().mean().sqrt().item() / (0.01 * 0.2) < 1.2


def test_muon_refuses_what_is_not_a_matrix():
    with pytest.raises(ValueError, match="matrices"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], "muon": True}], lr=0.1)


def test_every_parameter_is_in_one_group_and_norms_are_not_decayed():
    network = nn.Sequential(nn.Conv2d(3, 4, 2), nn.LayerNorm(4), nn.Linear(4, 2))
    groups = parameter_groups(network, 0.1, muon=True)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in network.parameters())
    matrices = [p for g in groups if g.get("muon") for p in g["params"]]
    assert len(matrices) == 1 and matrices[0] is network[2].weight
    assert all(p.ndim > 1 for g in groups if g["weight_decay"] for p in g["params"])


# a source made of image files


def photos(folder: Path, classes: list[str], count: int = 6) -> None:
    for name in classes:
        number = sorted(classes).index(name)
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (20, 12 + index), (40 * number + 10, index, 0)).save(folder / name / f"{index}.png")


def test_an_image_folder_holds_its_classes_in_order_and_in_parts_that_share_nothing(tmp_path: Path):
    photos(tmp_path / "mine", ["bee", "ant", "cat"])
    parts = ImageFolder(root=tmp_path, train="mine", size=8, test_fraction=0.3, val_fraction=0.3).parts
    assert parts.task.input_shape == (3, 8, 8) and parts.task.output_shape == (3,)
    seen = []
    for x, y in (parts.train, parts.val, parts.test):
        assert x.dtype == torch.uint8 and torch.equal(x[:, 0, 4, 4].long(), 40 * y + 10)  # red is ant, bee, cat
        seen += [(int(a), int(b)) for a, b in zip(y, x[:, 1, 4, 4], strict=True)]
    assert len(seen) == len(set(seen)) == 18


def test_an_image_is_resized_and_its_middle_cut_out(tmp_path: Path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = 200
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert np.array_equal(read_image(tmp_path / "x.png", 8), pixels[:, 4:12])
    assert read_image(tmp_path / "x.png", 5).shape == (5, 5, 3)


def test_bad_image_folders_are_errors(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="one folder per class"):
        ImageFolder(root=tmp_path, train="none").setup()
    photos(tmp_path / "one", ["ant"])
    with pytest.raises(ValueError, match="at least two"):
        ImageFolder(root=tmp_path, train="one").setup()
    photos(tmp_path / "two", ["ant", "bee"])
    photos(tmp_path / "other", ["ant", "cow"])
    with pytest.raises(ValueError, match=r"other has classes that two lacks: \['cow'\]"):
        ImageFolder(root=tmp_path, train="two", test="other").setup()
    (tmp_path / "two" / "bee" / "9.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot read the image"):
        ImageFolder(root=tmp_path, train="two").setup()


# the whole


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Dropout(0.1), nn.GELU(), nn.Flatten(), nn.Linear(32, 2))


def two_classes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dark and bright images."""
    y = torch.arange(count) % 2
    return (images(count) * 100 + 100 * y[:, None, None, None]).byte(), y


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, optimizer: str):
    recipe = Recipe(
        epochs=3,
        batch_size=8,
        accumulate=2,
        optimizer=optimizer,
        half=False,
        ema=0.5,
        augmentation=Augmentation(mixup=0.3),
    )
    for name, stops in (("whole", [3]), ("parts", [1, 2, 3])):
        for stop in stops:
            options = {"max_epochs": stop, "accelerator": "cpu"}
            pretrain(network(), two_classes(40), two_classes(20), tmp_path / name, recipe, trainer=options)
    checkpoints = [torch.load(tmp_path / name / "last.ckpt", weights_only=False) for name in ("whole", "parts")]
    states = [checkpoint["state_dict"] for checkpoint in checkpoints]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert checkpoints[0]["global_step"] == checkpoints[1]["global_step"] == 9
    curves = [(tmp_path / name / "curve.csv").read_text().splitlines() for name in ("whole", "parts")]
    seconds = curves[0][0].split(",").index("seconds")
    columns = [[[v for i, v in enumerate(line.split(",")) if i != seconds] for line in curve] for curve in curves]
    assert columns[0] == columns[1] and len(columns[0]) == 4


def test_training_learns_and_writes_the_averaged_weights(tmp_path: Path):
    recipe = Recipe(epochs=6, batch_size=8, lr=0.01, ema=0.5, augmentation=STILL)
    path = pretrain(network(), two_classes(40), two_classes(20), tmp_path, recipe, trainer={"accelerator": "cpu"})
    with safe_open(path, framework="pt") as stream:
        assert float(stream.metadata()["val_top1"]) == 1.0
    weights = load_file(path)
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert weights.keys() == network().state_dict().keys()


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path):
    data = two_classes(16), two_classes(8)
    cpu = {"accelerator": "cpu"}
    pretrain(network(), *data, tmp_path, Recipe(epochs=1, batch_size=8), trainer=cpu)
    with pytest.raises(ValueError, match="lr"):
        pretrain(network(), *data, tmp_path, Recipe(epochs=2, batch_size=8, lr=0.5), trainer=cpu)


def test_no_images_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="needs images"):
        pretrain(network(), two_classes(0), two_classes(8), tmp_path, Recipe())


SMALL = [
    "source=digits",
    "source.train_limit=60",
    "source.test_limit=20",
    "backbone=swin_demo",
    *(f"backbone.options.{x}" for x in ("embed_dim=8", "depths=[1,1]", "num_heads=[1,2]", "patch_size=4")),
    "++backbone.recipe={epochs: 1, batch_size: 16}",
    "trainer=cpu",
]


def test_the_stage_writes_weights_once_and_its_cached_twin_too(composed, tmp_path: Path):
    settings = composed("stage=pretrain", "run=pre", *SMALL)
    run(settings)
    weights = tmp_path / "runs" / "pre" / "pretrain" / "weights.safetensors"
    before = weights.stat().st_mtime_ns
    sample = weights.with_name("source.npz")
    embedder = source_model({**plain(settings.backbone), "pretrained": str(weights)}).embedder
    Embedded(file=str(sample)).check(embedder)
    sample.unlink()
    run(settings)  # done: only what is missing is made again
    assert weights.stat().st_mtime_ns == before
    assert sample.exists()
    cached = on_source(settings)
    assert cached == on_source(settings) and cached.is_relative_to(tmp_path / "runs" / "cache")
    assert {name: value.shape for name, value in load_file(cached).items()} == {
        name: value.shape for name, value in load_file(weights).items()
    }


def test_a_model_is_the_same_whether_its_weights_were_there_or_are_made_first(composed):
    settings = composed("backbone.pretrained=on_source", "embedder.aligned=false", "data=digits", *SMALL)
    task = Task("classification", (1, 8, 8), (10,))
    made, found = (build_model(settings, task).state_dict() for _ in range(2))
    assert all(torch.equal(made[name], found[name]) for name in made)


def test_the_stage_refuses_an_unknown_part_to_validate_on(composed):
    with pytest.raises(ValueError, match="validate_on"):
        run(composed("stage=pretrain", *SMALL, "++backbone.recipe.validate_on=train"))
