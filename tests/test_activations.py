"""What hooks collect from a body, and spectra against planted ranks and their nulls."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from shared import apart
from torch import nn

from orca_rank.measuring.activations import collect, module_of
from orca_rank.measuring.gradients import Gradients, collect_gradients
from orca_rank.measuring.hidden import hidden_dimensions, pooled
from orca_rank.measuring.matrices import adaptable_layers, matrix_of
from orca_rank.measuring.spectra import (
    activation,
    intrinsic_dimension,
    leading,
    load_directions,
    load_gradients,
    ot_map,
    transport,
    upper_bound,
    weight_rank,
)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def orthonormal(d, k, seed):
    return torch.linalg.qr(torch.randn(d, k, generator=generator(seed), dtype=torch.float64))[0]


class Windows(nn.Module):
    """Tokens (B, N, d) -> windows (B nW, w, d) -> Linear -> back, as Swin does it, and a fused qkv beside."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 5)
        self.qkv = nn.Linear(3, 6)

    def forward(self, x):
        windows = x.reshape(len(x) * 2, -1, 3)
        return self.inner(windows).reshape(len(x), -1, 5).mean(1) + self.qkv(x).mean((1, 2))[:, None]


def test_collect_keeps_images_apart_and_stops_at_the_limit():
    body = Windows()
    x = torch.randn(10, 8, 3, generator=generator(0))
    y = torch.arange(10)
    modules = {"inner": body.inner, "qkv": body.qkv}
    seen = []
    batches = [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]
    found, labels = collect(body, modules, batches, 7, tokens=21, advance=seen.append)
    assert labels.tolist() == list(range(7))
    assert seen == [4, 3]
    for name in modules:
        assert torch.allclose(found[name].pooled, x[:7].mean(1), atol=1e-6)
        assert found[name].tokens.shape == (7, 3, 3)
        for image in range(7):  # every kept token is one of the image's own
            own = (found[name].tokens[image, :, None] == x[image, None]).all(-1).any(1)
            assert own.all()
    assert not body.inner._forward_hooks and not body.inner._forward_pre_hooks
    for tokens, images, each in ((5000, 10, 8), (198, 10, 2), (197, 10, 1), (6, 6, 1), (0, 0, 1)):
        few, _ = collect(body, modules, batches, 99, tokens=tokens)
        assert few["inner"].pooled.shape == (10, 3)
        assert few["inner"].tokens.shape == (images, each, 3)


def test_collect_refuses_bad_input():
    body = Windows()
    with pytest.raises(ValueError, match="no images"):
        collect(body, {"inner": body.inner}, [], 4)
    with pytest.raises(ValueError, match=r"inner.*NaN"):
        collect(body, {"inner": body.inner}, [(torch.full((2, 8, 3), float("nan")), torch.zeros(2))], 4)


def test_module_of_a_third():
    body = Windows()
    assert module_of("qkv", body) == module_of("qkv.k", body) == "qkv"
    with pytest.raises(ValueError, match="nothere"):
        module_of("nothere.q", body)


D = 24
SPREAD = torch.exp(-torch.arange(D).double() / D * 2)
WEIGHT = torch.randn(D, D, generator=generator(3), dtype=torch.float64) / D**0.5


def images(seed, n, tokens, shift=None):
    """Tokens that share a part within their image: the image is the unit."""
    own = torch.randn(n, 1, D, generator=generator(seed), dtype=torch.float64)
    each = torch.randn(n, tokens, D, generator=generator(seed + 10_000), dtype=torch.float64)
    x = (own + each) * SPREAD @ orthonormal(D, D, 5)
    return x if shift is None else x @ shift


@pytest.mark.parametrize("k", [1, 4, 12])
def test_ot_map_recovers_the_rank_of_a_symmetric_covariance_shift(k):
    u = orthonormal(D, k, 9)
    shift = torch.eye(D, dtype=torch.float64) + 2 * u @ u.T
    found = ot_map(WEIGHT, transport(images(1, 6000, 1), images(2, 6000, 1, shift), splits=6), keep=D)
    assert found.rank == k
    # ΔW = W (T − I) with T = (I + 2 U Uᵀ)⁻¹, so its singular directions act on the span of U alone.
    a, b = found.a[:k], found.b[:, :k]
    expected = WEIGHT @ (torch.linalg.inv(shift) - torch.eye(D, dtype=torch.float64))
    assert torch.linalg.matrix_norm(b @ a - expected) < 0.1 * torch.linalg.matrix_norm(expected)


def test_ot_map_is_quiet_under_the_null_and_blind_to_a_shift_of_the_mean():
    quiet = [
        ot_map(WEIGHT, transport(images(2 * s, 60, 3), images(2 * s + 1, 60, 3) + s % 2, splits=6)).rank > 0
        for s in range(40)
    ]
    assert np.mean(quiet) <= 0.125  # 5 % of 40, and two standard deviations
    x = images(0, 50, 2)
    same = ot_map(WEIGHT, transport(x, x, splits=3))
    assert same.values.max() < 1e-5
    assert same.rank == 0


def test_ot_map_on_a_projection_of_wide_inputs():
    u = orthonormal(D, 2, 9)
    shift = torch.eye(D, dtype=torch.float64) + 2 * u @ u.T
    carried = transport(images(1, 3000, 1), images(2, 3000, 1, shift), splits=4, components=16)
    assert carried.basis.shape == (D, 16)
    assert torch.allclose(carried.basis.T @ carried.basis, torch.eye(16, dtype=torch.float64), atol=1e-6)
    assert ot_map(WEIGHT, carried).rank == 2


class Student(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.layer = nn.Linear(D, D, bias=False)
        self.layer.weight = nn.Parameter(weight.float(), requires_grad=False)

    def forward(self, x):
        return self.layer(x)


def squared(prediction, y):
    return ((prediction - y) ** 2).sum((1, 2)).mean() / 2


def gradients(seed, k, n=400, tokens=3, draws=8):
    student = Student(WEIGHT)
    x = images(seed, n, tokens).float()
    change = (orthonormal(D, k, seed) @ orthonormal(D, k, seed + 1).T).float() if k else torch.zeros(D, D)
    signal = x @ change.T
    noise = images(seed + 77, n, tokens).float()
    noise = noise / noise.std() * (signal.std() if k else 1.0)  # SNR 1
    y = student(x) + signal + noise
    batches = [(x[i : i + 128], y[i : i + 128]) for i in range(0, n, 128)]
    return collect_gradients(
        lambda t: t, student, squared, {"layer": student.layer}, batches, n, draws=draws, seed=seed
    ), (x, y, student)


@pytest.mark.parametrize("k", [1, 4, 8])
def test_gradient_recovers_the_planted_rank_at_snr_one(k):
    assert gradients(5, k, n=3000)[0]["layer"].spectrum().rank == k


def test_gradient_is_quiet_under_the_null():
    assert np.mean([gradients(100 + s, 0, n=100)[0]["layer"].spectrum().rank > 0 for s in range(40)]) <= 0.125


def test_the_whitened_gradient_holds_correlations():
    """Inputs x = M u and gradients δ = N (U diag(c) Vᵀ u + noise): the correlations are the planted ones, and stay
    where they are when M and N change; the null of whole images leaves just these above."""
    correlations, n = torch.tensor([0.9, 0.6, 0.4], dtype=torch.float64), 6000
    u, left, right = images(1, n, 1), orthonormal(D, 3, 2), orthonormal(D, 3, 3)
    u = u / u.std((0, 1))  # rows of unit variance, each direction of its own
    u = u @ torch.linalg.inv(torch.linalg.cholesky(u[:, 0].T @ u[:, 0] / n)).T
    noise = torch.randn(n, 1, D, generator=generator(4), dtype=torch.float64)
    own = torch.eye(D, dtype=torch.float64) - left @ (1 - (1 - correlations**2).sqrt()).diag() @ left.T
    delta = u @ right @ correlations.diag() @ left.T + noise @ own
    stretch = torch.linspace(0.5, 2, D, dtype=torch.float64).diag()
    for m, k in ((torch.eye(D).double(), torch.eye(D).double()), (orthonormal(D, D, 5) @ stretch, stretch)):
        found = Gradients((D, D), 8, torch.device("cpu"), moments=True)
        signs = torch.randint(0, 2, (8, n), generator=generator(7)) * 2.0 - 1
        found.add((u @ m.T).float(), (delta @ k.T).float(), signs)
        spectrum = found.whitened()
        assert spectrum.values[:3] == pytest.approx(correlations, rel=0.05)
        assert spectrum.rank == 3
        # The step of K-FAC, −Σ_δ⁻¹ G Σ_x⁻¹ (its inverses are damped).
        step = -torch.linalg.inv(k.T) @ left @ correlations.diag() @ right.T @ torch.linalg.inv(m)
        assert apart(spectrum.b[:, :3] @ spectrum.a[:3], step) < 0.15
    third = Gradients((D, D), 8, torch.device("cpu"), moments=True)
    third.add(u.float(), delta.float(), signs)
    assert third.whitened(slice(0, 8)).values[0] <= 1
    with pytest.raises(ValueError, match="moments=True"):
        Gradients((D, D), 8, torch.device("cpu")).whitened()


def test_the_whitened_gradient_is_quiet_under_the_null():
    def rank(seed):
        found = Gradients((12, 10), 8, torch.device("cpu"), moments=True)
        x, delta = (torch.randn(80, 3, d, generator=generator(2 * seed + i)) for i, d in enumerate((10, 12)))
        found.add(x, delta, torch.randint(0, 2, (8, 80), generator=generator(seed)) * 2.0 - 1)
        return found.whitened().rank

    assert np.mean([rank(seed) > 0 for seed in range(60)]) <= 0.11  # 5 % of 60, and two standard deviations


def test_gradients_are_those_of_autograd():
    found, (x, y, student) = gradients(1, 2, n=150)
    weight = student.layer.weight.detach().clone().requires_grad_()
    each = [torch.autograd.grad(squared(a[None] @ weight.T, b[None]), weight)[0] for a, b in zip(x, y, strict=True)]
    each = torch.stack(each)
    own = found["layer"]
    assert torch.allclose(own.mean(), each.mean(0), rtol=1e-3, atol=1e-4)
    assert own.fisher() == pytest.approx(float(each.square().mean()), rel=1e-3)
    assert own.importance(student.layer.weight) == pytest.approx(
        float((weight.detach() * each.mean(0)).abs().mean()), rel=1e-3
    )
    rows = slice(8, 16)  # a third of a fused matrix
    assert own.fisher(rows) == pytest.approx(float(each[:, rows].square().mean()), rel=1e-3)
    spectrum = own.spectrum(rows)
    assert spectrum.values == pytest.approx(torch.linalg.svdvals(each.mean(0)[rows]).double(), rel=1e-3)
    assert torch.allclose((spectrum.b @ spectrum.a).float(), -each.mean(0)[rows], atol=1e-3)


def test_gradients_pass_through_frozen_layers_and_windows():
    body = Windows().requires_grad_(False)
    x, y = torch.randn(6, 8, 3, generator=generator(1)), torch.zeros(6, 5)
    found = collect_gradients(
        lambda t: t, body, lambda p, t: (p - t).square().sum(1).mean(), {"inner": body.inner}, [(x, y)], 6, draws=3
    )["inner"]
    for parameter in body.parameters():
        assert parameter.grad is None
    body.requires_grad_(True)
    (body(x) - y).square().sum(1).mean().backward()
    assert torch.allclose(found.mean(), body.inner.weight.grad, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="no images"):
        collect_gradients(lambda t: t, body, squared, {"inner": body.inner}, [], 6)


def test_activation_spectrum_is_the_svd():
    x = images(0, 40, 3)
    rows = x.flatten(0, 1) - x.flatten(0, 1).mean(0)
    exact = torch.linalg.svdvals(rows)
    assert activation(x, keep=12).values == pytest.approx(exact[:12], rel=1e-9)
    found = activation(x, keep=5)  # wide inputs: a randomised factorisation
    assert found.values == pytest.approx(exact[:5], rel=1e-3)
    assert found.energy == pytest.approx(float(rows.square().sum()))
    assert torch.allclose(found.a @ found.a.T, torch.eye(5, dtype=torch.float64), atol=1e-6)
    assert found.rank is None
    assert found.b is None


def test_leading_singular_values_of_a_wide_matrix():
    matrix = torch.randn(3, 90, 120, generator=generator(0), dtype=torch.float64)
    exact = torch.linalg.svdvals(matrix)[:, 0]
    found = leading(matrix, 1)[1][:, 0]
    assert found == pytest.approx(exact, rel=1e-3)
    assert (found <= exact * (1 + 1e-12)).all()


def test_directions_are_read_as_adapters_take_them(tmp_path):
    path = tmp_path / "directions.safetensors"
    save_file({"ot_map/x.q.A": torch.ones(2, 3), "ot_map/x.q.B": torch.ones(4, 2), "activation/x.q.A": WEIGHT}, path)
    a, b = load_directions(path, "ot_map")["x.q"]
    assert (a.shape, b.shape) == ((2, 3), (4, 2))
    assert torch.equal(load_directions(path, "activation")["x.q"], WEIGHT)
    for load, kind in ((partial(load_directions, kind="gradient"), "gradient"), (load_gradients, "mean_gradient")):
        with pytest.raises(ValueError, match=rf"gap\.measurements\.{kind}=true"):
            load(path)
    with pytest.raises(FileNotFoundError, match="stage=measure"):
        load_directions(tmp_path / "none", "ot_map")


def test_ranks_of_a_weight():
    q = orthonormal(D, 6, 1)
    found = weight_rank(q @ q.T)
    assert (found.stable_rank, found.effective_rank) == pytest.approx((6.0, 6.0), rel=1e-4)
    assert weight_rank(torch.zeros(3, 4)).stable_rank == 0
    single = weight_rank(torch.outer(torch.arange(1.0, 4), torch.ones(5)))
    assert single.stable_rank == pytest.approx(1)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_intrinsic_dimension_of_a_flat_sheet(d):
    points = torch.rand(1500, d, generator=generator(d), dtype=torch.float64) @ orthonormal(12, d, 2).T
    assert intrinsic_dimension(points.float()) == pytest.approx(d, rel=0.15)
    with pytest.raises(ValueError, match="different"):
        intrinsic_dimension(torch.ones(50, 3))


class Squares(nn.Module):
    """A block (B, N, 12) -> (B, N, 12) that adds the squares of the first six numbers to the last six."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x):
        return torch.cat([x[..., :6], x[..., 6:] + x[..., :6].square()], -1)


@pytest.mark.parametrize("first", [False, True])
def test_hidden_states_are_those_around_a_block(first):
    """Tokens m + b and m − b: their mean m fills two dimensions, with the mean of squares m² + b² it is five."""

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Squares(), nn.Identity()])
            self.head = nn.Linear(12, 12)

        def forward(self, x):  # pixels before tokens, as a convolutional block has them
            x = self.blocks[0](x)
            return self.head(x.movedim(1, -1) if first else x)

    m, b = torch.zeros(1500, 12), torch.zeros(1500, 12)
    m[:, :2] = torch.rand(1500, 2, generator=generator(0))
    b[:, 3:6] = 1 + torch.rand(1500, 3, generator=generator(1))
    x = torch.stack([m + b, m - b], 1)  # (n, 2, 12)
    body = Body().requires_grad_(False)
    if first:
        x = x.movedim(1, -1)[..., None]  # (n, 12, 2, 1)
        body.blocks[0].forward = lambda x: Squares.forward(body.blocks[0], x.movedim(1, -1)).movedim(-1, 1)
    layers = {"blocks.0.fc": body.blocks[0].fc, "head": body.head}
    found = hidden_dimensions(body, layers, dict(body.named_modules()), [(x, None)], 1500)
    assert found.keys() == {"blocks.0", "head"}
    assert found["blocks.0"] == pytest.approx((2, 5), rel=0.15)
    assert found["head"][0] == pytest.approx(found["blocks.0"][1])
    with pytest.raises(ValueError, match=r"blocks\.0 took no part"):
        hidden_dimensions(nn.Identity(), layers, dict(body.named_modules()), [(x, None)], 20)


def test_hidden_states_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"hidden state of block has shape \(4, 7\).*width 3 or 5"):
        pooled(torch.ones(4, 7), 4, {3, 5}, "block")


def test_upper_bound_holds_for_a_further_draw():
    draws = np.random.default_rng(0).standard_normal((4000, 9))
    above = np.mean([row[-1] > upper_bound(row[:-1]) for row in draws])
    assert above == pytest.approx(0.025, abs=0.01)
    with pytest.raises(ValueError, match="at least 2"):
        upper_bound([1.0])


def test_a_1x1_convolution_is_measured_as_the_linear_of_every_pixel():
    torch.manual_seed(0)
    x = torch.randn(6, 4, 5, 7, dtype=torch.float64)  # (B, C, H, W)
    conv = nn.Sequential(nn.Conv2d(4, 3, 1, stride=(2, 3)), nn.GELU(), nn.Conv2d(3, 2, 1)).double()
    linear = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2)).double()
    for mine, theirs in ((conv[0], linear[0]), (conv[2], linear[2])):
        theirs.weight.data, theirs.bias.data = mine.weight.flatten(1).detach(), mine.bias.detach()
    seen = x[:, :, ::2, ::3].permute(0, 2, 3, 1)  # (B, 3, 3, C)
    y = torch.zeros(6, dtype=torch.long)
    both = []
    for model, images, head in ((conv, x, lambda z: z.mean((2, 3))), (linear, seen, lambda z: z.mean((1, 2)))):
        modules = {name: matrix_of(model, name) for name in ("0", "2")}
        inputs, _ = collect(model, modules, [(images, y)], 6, tokens=6)
        gradients = collect_gradients(
            lambda z: z, lambda z, model=model, head=head: head(model(z)), F.cross_entropy, modules, [(images, y)], 6
        )
        both.append((inputs, gradients))
    (inputs, gradients), (expected, slopes) = both
    for name in ("0", "2"):
        assert apart(inputs[name].pooled, expected[name].pooled) < 1e-6
        assert apart(inputs[name].tokens, expected[name].tokens) < 1e-6
        assert apart(gradients[name].mean(), slopes[name].mean()) < 1e-6
        assert gradients[name].mean().norm() > 0
    layers = adaptable_layers(conv, "0|2")
    assert [(layer.name, layer.d_in, layer.d_out) for layer in layers] == [("0", 4, 3), ("2", 3, 2)]


@pytest.mark.parametrize("options", [{"kernel_size": 3}, {"kernel_size": 1, "groups": 2},
                                     {"kernel_size": 1, "padding": 1}])  # fmt: skip
def test_other_convolutions_are_no_matrices(options):
    with pytest.raises(TypeError, match="1 × 1 Conv2d"):
        matrix_of(nn.Sequential(nn.Conv2d(4, 4, **options)), "0")
    with pytest.raises(ValueError, match="matches none"):
        adaptable_layers(nn.Sequential(nn.Conv2d(4, 4, **options)), "0")


def test_inputs_by_name_and_without_targets():
    model = nn.Linear(3, 2)
    x = torch.randn(7, 5, 3)
    batches = [({"x": x[:4], "mask": x[:4, :, 0]}, None), ({"x": x[4:], "mask": x[4:, :, 0]}, None)]
    found, y = collect(lambda given: model(given["x"] * given["mask"][..., None]), {"layer": model}, batches, 6)
    assert y is None
    assert apart(found["layer"].pooled, (x * x[..., :1])[:6].mean(1)) < 1e-6


def test_what_is_no_number_of_tokens_an_image_is_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"what reaches layer has shape \(5, 3\).*each of the 4 images"):
        collect(lambda x: model(torch.ones(5, 3)), {"layer": model}, [(torch.ones(4, 3), None)], 4)
