"""Rank rules where the answer is known: teachers whose update has a planted rank in every layer.

    python benchmarks/planted_rank.py              all four worlds, a few minutes on one core
    python benchmarks/planted_rank.py --world swin --repeats 2

chain: linear chains, error against Zeng and Lee's bound. shift: covariance shifts, recovered by the OT map. labels:
labelled updates at SNR 1, recovered by the gradient. swin: a tiny Swin teacher with ΔW of planted ranks in some layers;
each rule's plan at equal budget trains a student, whose loss is compared with that of the oracle's plan.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import timm
import torch
from torch import Tensor, nn

from orca_rank import ranks
from orca_rank.adapters import inject
from orca_rank.distances import mmd
from orca_rank.distances.calibrate import calibrate
from orca_rank.measuring.activations import collect
from orca_rank.measuring.gradients import Gradients, collect_gradients
from orca_rank.measuring.records import Dimension, Gap, Spectrum
from orca_rank.measuring.spectra import activation, intrinsic_dimension, ot_map, transport, weight_rank
from orca_rank.ranks import Budget, Layer
from orca_rank.ranks.theory import chain_error, fit_chain

D = 64


def orthonormal(d: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]


def chain(repeats: int) -> None:
    """Lemma 1: the construction reaches σ_{RL+1}(E), and gradient descent does not get below it."""
    generator = np.random.default_rng(0)
    weights = [np.eye(16) + 0.1 * generator.standard_normal((16, 16)) for _ in range(2)]
    error = generator.standard_normal((16, 8)) @ generator.standard_normal((8, 16)) / 8
    target = weights[1] @ weights[0] + error
    print("chain: L = 2, rank(E) = 8")
    for rank in range(1, 5):
        updates = fit_chain(weights, error, rank)
        reached = np.linalg.norm((weights[1] + updates[1]) @ (weights[0] + updates[0]) - target, 2)
        print(f"  R = {rank}: spectral error {reached:.6f}, bound {chain_error(error, rank, 2):.6f}")


def shift(repeats: int) -> None:
    """x_t = (I + 2 U Uᵀ) x with U (d, k): ranks of the OT map at d = 64."""
    weight = torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / D**0.5
    spread = torch.exp(-torch.arange(D).double() / D * 2)

    def images(seed: int, n: int, tokens: int, k: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        own = torch.randn(n, 1, D, generator=generator, dtype=torch.float64)
        x = (own + torch.randn(n, tokens, D, generator=generator, dtype=torch.float64)) * spread
        u = orthonormal(D, k, torch.Generator().manual_seed(9)) if k else torch.zeros(D, 1, dtype=torch.float64)
        return x + 2 * (x @ u) @ u.T

    for k in (1, 4, 16, 32):
        found = [
            ot_map(weight, transport(images(2 * s, 20_000, 1, 0), images(2 * s + 1, 20_000, 1, k), seed=s), D).rank
            for s in range(repeats)
        ]
        print(f"shift: k = {k}, n = 20,000: found {found}")
    false = [
        ot_map(weight, transport(images(2 * s, 100, 4, 0), images(2 * s + 1, 100, 4, 0), seed=s)).rank > 0
        for s in range(200)
    ]
    print(f"shift: k = 0, 200 repetitions of 100 + 100 images of 4 tokens: false positives {np.mean(false):.3f}")


def labels(repeats: int) -> None:
    """y = (W + E) x + noise at SNR 1: ranks of the gradient."""

    def trial(seed: int, k: int, n: int) -> int:
        generator = torch.Generator().manual_seed(seed)
        layer = nn.Linear(D, 48, bias=False).requires_grad_(False)
        x = torch.randn(n, 1, D, generator=generator) + torch.randn(n, 4, D, generator=generator)
        update = (orthonormal(48, k, generator) @ orthonormal(D, k, generator).T).float() if k else torch.zeros(48, D)
        noise = torch.randn(n, 1, 48, generator=generator) + torch.randn(n, 4, 48, generator=generator)
        signal = x @ update.T
        y = layer(x) + signal + noise / noise.std() * (signal.std() if k else 1.0)
        batches = [(x[i : i + 250], y[i : i + 250]) for i in range(0, n, 250)]
        found = collect_gradients(lambda t: t, layer, squared, {"layer": layer}, batches, n, draws=20, seed=seed)
        return int(found["layer"].spectrum().rank or 0)

    for k in (4, 12):
        print(f"labels: k = {k}, SNR 1, n = 2,000: found {[trial(s, k, 2000) for s in range(repeats)]}")
    print(f"labels: k = 0, 200 repetitions of 300 images: false positives "
          f"{np.mean([trial(1000 + s, 0, 300) > 0 for s in range(200)]):.3f}")  # fmt: skip


def squared(prediction: Tensor, y: Tensor) -> Tensor:
    return (prediction - y).square().flatten(1).sum(1).mean() / 2


def tiny_swin() -> nn.Module:
    options = {
        "img_size": 32,
        "patch_size": 4,
        "window_size": 4,
        "embed_dim": 32,
        "depths": (2, 2),
        "num_heads": (2, 4),
    }
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, global_pool="", **options).eval()


def swin(repeats: int) -> None:
    """Recovered ranks and the loss of a student at equal budget, each rule's over the oracle's."""
    scores: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(repeats):
        for name, row in swin_once(seed).items():
            scores.setdefault(name, []).append(row)
    print(
        f"swin: {repeats} teachers; median student loss over the oracle's, mean |rank − planted|, ranks in layers at 0"
    )
    for name, rows in sorted(scores.items(), key=lambda item: np.median([row[0] for row in item[1]])):
        ratio, wrong, false = (
            np.median([r[0] for r in rows]),
            np.mean([r[1] for r in rows]),
            np.mean([r[2] for r in rows]),
        )
        print(f"  {name:<14} {ratio:7.3f} {wrong:6.2f} {false:6.2f}")


def swin_once(seed: int, images: int = 192, steps: int = 80) -> dict[str, tuple[float, float, float]]:
    torch.manual_seed(seed)
    base = tiny_swin().requires_grad_(False)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    linear = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and ".blocks." in n}
    layers = [Layer(name, module.in_features, module.out_features) for name, module in linear.items()]
    generator = torch.Generator().manual_seed(seed)
    planted = {layer.name: int(torch.randint(4, (), generator=generator)) * 2 for layer in layers}
    chosen = torch.randperm(len(layers), generator=generator)[len(layers) // 3 :].tolist()
    planted = {layer.name: planted[layer.name] if i in chosen else 0 for i, layer in enumerate(layers)}

    smooth = torch.randn(3, 3, generator=generator)
    source = torch.randn(images, 3, 32, 32, generator=generator)
    x = torch.einsum("ij,njhw->nihw", smooth, torch.randn(2 * images, 3, 32, 32, generator=generator)) + 0.5
    teacher = tiny_swin()
    teacher.load_state_dict(state)
    with torch.no_grad():
        for name, rank in planted.items():
            module = teacher.get_submodule(name)
            if rank:
                u, v = (orthonormal(d, rank, generator).float() for d in module.weight.shape)
                module.weight += 0.5 * torch.linalg.matrix_norm(module.weight) / rank**0.5 * u @ v.T
        y = teacher(x)
    y = y + 0.1 * y.std() * torch.randn(y.shape, generator=generator)
    train, test = (x[:images], y[:images]), (x[images:], y[images:])

    measured = measure(base, linear, layers, source, train, generator)
    budget = Budget(total_rank=max(len(layers), sum(planted.values())))
    rules: dict[str, Callable[..., ranks.RankPlan]] = {
        name: getattr(ranks, name)
        for name in ("uniform", "proportional", "shuffled", "inverse", "ibp_count", "ibp_stick", "beta_bernoulli",
                     "ot_map", "gradient", "activation", "stable_rank", "importance", "fisher", "gelora")
    }  # fmt: skip
    plans = {name: rule(measured, budget).ranks for name, rule in rules.items()}
    plans["oracle"] = planted
    losses = {name: student_loss(state, plan, train, test, steps, seed) for name, plan in plans.items()}
    quiet = [name for name, rank in planted.items() if rank == 0]
    return {
        name: (
            losses[name] / losses["oracle"],
            float(np.mean([abs(plan[n] - planted[n]) for n in planted])),
            float(np.mean([plan[n] for n in quiet])),
        )
        for name, plan in plans.items()
    }


def measure(
    body: nn.Module, linear: dict[str, nn.Module], layers: list[Layer], source: Tensor, train: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> list[Layer]:  # fmt: skip
    count = len(source)
    left, _ = collect(body, linear, [(source, torch.zeros(count))], count, tokens=8 * count)
    right, _ = collect(body, linear, [train], count, tokens=8 * count)
    embed, rest = body.patch_embed, lambda t: body.norm(body.layers(t))
    batches = [(train[0][i : i + 64], train[1][i : i + 64]) for i in range(0, count, 64)]
    gradients: dict[str, Gradients] = collect_gradients(embed, rest, squared, linear, batches, count)
    dimensions = [intrinsic_dimension(right[layer.name].pooled) for layer in layers]
    dimensions.append(dimensions[-1])
    records = []
    for index, layer in enumerate(layers):
        weight, own = linear[layer.name].weight, gradients[layer.name]
        pair = left[layer.name].pooled.numpy(), right[layer.name].pooled.numpy()
        gap = calibrate(mmd, *pair, bootstrap=0, permutations=0)
        spectra = {
            "ot_map": ot_map(weight, transport(left[layer.name].tokens, right[layer.name].tokens)),
            "gradient": own.spectrum(),
            "activation": activation(right[layer.name].tokens),
        }
        measured = {kind: Spectrum(tuple(s.values.tolist()), s.null, s.energy, s.rank) for kind, s in spectra.items()}
        records.append(
            replace(
                layer,
                gap={"mmd": Gap(gap.value)},
                weight=weight_rank(weight),
                intrinsic_dimension=Dimension(dimensions[index], dimensions[index + 1]),
                importance=own.importance(weight),
                fisher=own.fisher(),
                spectra=measured,
            )
        )
    return records


def student_loss(
    state: dict[str, Tensor],
    plan: dict[str, int],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    steps: int,
    seed: int,
) -> float:
    """Loss on fresh images after training LoRA of these ranks on the teacher's outputs."""
    model = tiny_swin()
    model.load_state_dict(state)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    inject(model, plan, generator=generator)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(train[0]), (32,), generator=generator)
        optimizer.zero_grad()
        squared(model(train[0][batch]), train[1][batch]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(squared(model(test[0]), test[1]))


WORLDS = {"chain": chain, "shift": shift, "labels": labels, "swin": swin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=[*WORLDS, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, world in WORLDS.items():
        if options.world in (name, "all"):
            world(options.repeats)


if __name__ == "__main__":
    main()
