"""What a network sees and how it is judged do not depend on the unit that data come in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orca_rank.data.arrays import Arrays, pseudo_labels
from orca_rank.normaliser import Normaliser
from orca_rank.task import Task, relative_l2, typical_norm, zero_fields

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.standard_normal((24, 2, 5, 6)), RANDOM.standard_normal((24, 5, 6)) + 0.3


def load(folder, x, y, **options) -> Arrays:
    np.savez(folder / "data.npz", x=x, y=y)
    return Arrays(root=folder, train="data.npz", **options)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return bool((a.double() - b.double()).norm() <= tolerance * b.double().norm())


@pytest.mark.parametrize("per", ["channel", "pixel"])
@pytest.mark.parametrize("factor", [1e-300, 1e-40, 1e-13, 1e9, 1e35, 1e300])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e8])  # in deviations
def test_inputs_and_errors_are_the_same_in_every_unit(tmp_path, per, factor, offset):
    if abs(factor * offset) > 1e300:
        pytest.skip("beyond float64")
    plain = load(tmp_path, X, Y, normalise=per).parts
    other = load(tmp_path, factor * X + factor * offset, factor * Y, normalise=per).parts
    seen, expected = (torch.cat([p.encode(x) for x, _ in (p.train, p.val, p.test)]) for p in (other, plain))
    assert seen.dtype == torch.float32 and close(seen, expected, 1e-5)
    prediction = torch.from_numpy(RANDOM.standard_normal((len(plain.test[1]), 1, 5, 6))).float()
    assert close(other.task.metric(prediction, other.test[1]), plain.task.metric(prediction, plain.test[1]), 1e-5)
    exact = other.task.normaliser.encode(other.test[1])
    assert close(exact, plain.task.normaliser.encode(plain.test[1]), 1e-5)
    assert other.task.metric(exact, other.test[1]).max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(st.floats(-13, 9), st.floats(-6, 6), st.sampled_from([np.float64, np.float32]))
def test_normalisers_are_equivariant(power, offset, dtype):
    x = torch.from_numpy(X)
    changed = torch.from_numpy((10.0**power * (X + 10.0**offset)).astype(dtype))
    rounding = torch.finfo(changed.dtype).eps * (1 + 10.0**offset)
    for per in ("channel", "pixel"):
        expected = Normaliser.fit(x, per).encode(x)
        assert close(Normaliser.fit(changed, per).encode(changed), expected, 1e-5 + 4 * rounding)


@pytest.mark.parametrize("offset", [1e3, 1e9])
def test_an_offset_of_the_field_costs_no_digits_of_the_error(tmp_path, offset):
    parts = load(tmp_path, X, Y + offset).parts
    u = parts.test[1]
    prediction = torch.from_numpy(RANDOM.standard_normal(u.shape)).float()
    decoded = parts.task.decode(prediction).double()
    expected = (decoded - u).flatten(1).norm(dim=1) / u.double().flatten(1).norm(dim=1)
    found = parts.task.metric(prediction, u)
    assert found.max() < 10 / offset and close(found, expected, 1e-3 if offset < 1e6 else 1e-5)
    loss = torch.zeros(u.shape, requires_grad=True)
    parts.task.loss(loss, u).backward()
    assert loss.grad.isfinite().all() and loss.grad.norm() > 0


def test_statistics_are_those_of_the_definition():
    x = torch.from_numpy(X)
    pixel, channel = Normaliser.fit(x, "pixel"), Normaliser.fit(x, "channel")
    torch.testing.assert_close((pixel.mean, pixel.std), (x.mean(0), x.std(0)))
    torch.testing.assert_close(channel.std.flatten(), x.std((0, 2, 3), correction=0))
    with_gaps = x.clone()
    with_gaps[:3, 0] = torch.nan
    gaps = Normaliser.fit(with_gaps, "pixel")
    torch.testing.assert_close((gaps.mean[0], gaps.std[0]), (x[3:, 0].mean(0), x[3:, 0].std(0)))
    assert not gaps.encode(with_gaps)[:3, 0].any()
    for wrong in ({"mean": torch.zeros(1)}, {"mean": torch.zeros(1), "std": -torch.ones(1)}):
        with pytest.raises(ValueError, match="mean"):
            Normaliser.from_dict(wrong)


def test_what_never_varies_is_its_constant():
    x = torch.from_numpy(X).clone()
    x[:, 1] = 300.1
    fitted = Normaliser.fit(x, "pixel")
    assert not fitted.std[1].any() and not fitted.encode(x)[:, 1].any()
    assert torch.equal(fitted.decode(torch.full((4, 2, 5, 6), 7.0).double())[:, 1], x[:4, 1])


# ---------------------------------------------------------------- fields without a norm


def test_the_error_of_an_all_zero_field_is_relative_to_a_typical_one():
    u = torch.ones(3, 1, 4, 4)
    u[1] = 0
    prediction = 1.5 * torch.ones(3, 1, 4, 4)
    norm = typical_norm(u[[0, 2]])
    assert norm == pytest.approx(4.0)
    torch.testing.assert_close(relative_l2(prediction, u, norm), torch.tensor([0.5, 1.5, 0.5]))
    torch.testing.assert_close(relative_l2(prediction, u), torch.tensor([0.5, 1.0, 0.5]))
    assert relative_l2(u, u, norm).tolist() == relative_l2(u, u).tolist() == [0, 0, 0]
    assert zero_fields(u, norm).tolist() == [1]
    for factor in (1e-30, 1e30):
        torch.testing.assert_close(
            relative_l2(factor * prediction, factor * u, factor * norm), torch.tensor([0.5, 1.5, 0.5])
        )
    assert relative_l2(prediction, u + 1e-9 * (u == 0), norm)[1] == pytest.approx(1.5)  # next to zero is zero


def test_zero_fields_are_counted_and_trained_on(tmp_path, caplog):
    y = Y.copy()
    y[:6] = 0
    data = load(tmp_path, X, y)
    data.setup()
    (note,) = data.notes
    assert "all zero" in note and note in caplog.text
    parts = (data.parts.train, data.parts.val, data.parts.test)
    counts = [(y.flatten(1).norm(dim=1) == 0).sum() for _, y in parts]
    assert sum(counts) == 6 and f"{counts[0]} of 17 in train" in note and f"{counts[2]} of 5 in test" in note
    task = data.task
    assert task == Task.from_dict(task.to_dict(), task.normaliser)
    mean_field = torch.zeros(24, 1, 5, 6)
    assert task.metric(mean_field, torch.from_numpy(y[:, None])).max() < 3
    y[:] = 0
    with pytest.raises(ValueError, match="the same in every training sample"):
        load(tmp_path, X, y).setup()
    with pytest.raises(ValueError, match="the same in every training sample"):
        load(tmp_path, 0 * X + 0.1, Y).setup()


# ---------------------------------------------------------------- missing values


@pytest.mark.parametrize(
    ("value", "dtype"), [(-9999.0, np.float64), (1e20, np.float32), (9.96921e36, np.float32), (-32768, np.int16)]
)
def test_fill_values_are_named_and_left_out_when_told(tmp_path, value, dtype):
    scale = 100 if dtype == np.int16 else 1
    x = (scale * X + 300).astype(dtype)
    x[::3, 1, :2] = value
    with pytest.raises(ValueError, match=r"exactly 96 times.*channel 1.*data\.fill=") as caught:
        load(tmp_path, x, Y).setup()
    told = str(caught.value).split("data.fill=")[1].split()[0]
    parts = load(tmp_path, x, Y, fill=float(told)).parts
    seen = torch.cat([parts.encode(x) for x, _ in (parts.train, parts.val, parts.test)])
    assert abs(seen[:, 1].std() - np.sqrt(1 - 96 / 720)) < 0.15  # the rest has deviation 1, the missing are its mean
    assert (seen[:, 1] == 0).sum() == 96
    assert load(tmp_path, x, Y, fill="none").parts.encode(torch.from_numpy(x[:1].astype(np.float64))).abs().max() < 3


def test_missing_values_of_a_field_do_not_count(tmp_path):
    y = Y.copy()
    y[:, 0] = np.nan
    y[:, 1] = -9999.0
    with pytest.raises(ValueError, match=r"NaN.*data\.fill=nan"):
        load(tmp_path, X, y).setup()
    with pytest.raises(ValueError, match=r"-9999 exactly.*data\.fill=-9999"):
        load(tmp_path, X, y, fill=float("nan")).setup()
    task = load(tmp_path, X, y, fill=[float("nan"), -9999]).task
    target = torch.from_numpy(np.where(y == -9999, np.nan, y))[:, None]
    prediction = torch.from_numpy(RANDOM.standard_normal(target.shape)).float().requires_grad_()
    error = task.metric(prediction, target)
    decoded = task.decode(prediction)[:, :, 2:].detach()
    expected = relative_l2(decoded, target[:, :, 2:].float())
    assert close(error.detach(), expected, 1e-5)
    error.sum().backward()
    assert prediction.grad.isfinite().all() and not prediction.grad[:, :, :2].any()


def test_ordinary_fields_are_not_taken_for_fill_values(tmp_path):
    ponds = np.maximum(X, 0)  # half of it is exactly 0
    clipped = np.clip(X, -1, 1)
    spikes = np.where(X > 2, 50.0, 0.0)
    coefficient = np.where(X > 0, 12.0, 3.0)
    margin = X + 20.0
    margin[:, :, 0] = 0  # a border of zeros, four ranges away
    for x in (ponds, clipped, spikes, coefficient, margin):
        load(tmp_path, x, Y).setup()


def test_bad_fill_options(tmp_path):
    for fill in ("mean", True):
        with pytest.raises(ValueError, match="fill must be"):
            load(tmp_path, X, Y, fill=fill)


def test_where_float32_is_not_enough_it_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"float32 cannot hold.*normalise=channel"):
        load(tmp_path, 1e-60 * X, Y, normalise="none").setup()
    notes = load(tmp_path, (X + 1e6).astype(np.float32), Y).parts.notes  # damaged before it came here
    assert "steps of the resolution of float32" in notes[0]
    assert not load(tmp_path, X + 1e6, Y).parts.notes
    with pytest.raises(ValueError, match=r"2\^53"):
        load(tmp_path, (2**60 + 1000 * X).astype(np.int64), Y).setup()


def test_pseudo_labels_do_not_depend_on_the_unit():
    x = torch.from_numpy(X)
    labels = pseudo_labels(x, 3, seed=0)
    assert len(labels.unique()) == 3
    for other in (1e-30 * x, 1e30 * x, x + 1e7):
        assert torch.equal(pseudo_labels(other, 3, seed=0), labels)


def test_a_prediction_that_is_not_a_number_has_no_error_that_is_one():
    scores = torch.tensor([[0.0, 1.0], [torch.nan, 0.0], [0.0, torch.nan], [torch.inf, 0.0]])
    error = Task("classification", (1, 2, 2), (2,)).metric(scores, torch.tensor([1, 0, 1, 1]))
    assert error.isnan().tolist() == [False, True, True, False] and error[0] == 0 and error[3] == 1
    field = torch.ones(2, 1, 2, 2)
    field[1, 0, 0, 0] = torch.nan
    assert Task("dense", (1, 2, 2), (1, 2, 2)).metric(field, torch.ones(2, 1, 2, 2)).isnan().tolist() == [False, True]


@pytest.mark.parametrize("value", [-9999.0, 1e20, 9.969209968386869e36])
def test_a_known_fill_value_is_named_where_it_stands_once(tmp_path, value):
    x = X.copy()
    x[7, 1, 2, 2] = value
    with pytest.raises(ValueError, match=r"exactly 1 times.*channel 1"):
        load(tmp_path, x, Y).setup()
    load(tmp_path, X * 1.234e20, Y).setup()  # a large unit alone is none
    x[7, 1, 2, 2] = 777.0  # nor is a single number far away
    load(tmp_path, x, Y).setup()


def test_what_would_overflow_or_is_not_scaled_is_said(tmp_path):
    with pytest.raises(ValueError, match="not even float64 holds their norms"):
        load(tmp_path, X, Y / np.abs(Y).max() * 1.7e308).setup()
    notes = load(tmp_path, 1e-13 * X, 1e-13 * Y, normalise="none").notes
    assert len(notes) == 2 and all("data.normalise=channel" in note for note in notes)
    assert not load(tmp_path, X, Y, normalise="none").notes
    x = X.copy()
    x[:, 0] = 5.0
    assert "1 channels of the inputs never vary in training, or are missing: 0; left out" in load(tmp_path, x, Y).notes
