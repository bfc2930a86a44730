"""One pass of per-image weight gradients over a frozen body: what the labels say about every layer at the start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from orca_rank.measuring.matrices import Matrix, inputs_of, outputs_of, weight_of
from orca_rank.measuring.passes import Shared, check_seen, portions, watch
from orca_rank.measuring.spectra import Decomposition, leading, upper_bound
from orca_rank.processes import add_up

DAMPING = 1e-3  # of the mean eigenvalue, added to a second moment before it is inverted
ELEMENTS = 2**24  # of per-image gradients held at once, 64 MiB in float32


class Gradients:
    """Running sums over images m of the gradient P_m (d_out, d_in) of one weight.

    mean: G = (1/n) Σ P_m. signed: Σ ε_m P_m for several draws of signs ε_m = ±1, one sign an image. moments: Σ δδᵀ and
    Σ xxᵀ over all tokens, of the gradients at the outputs and of the inputs; None where they are not asked for.
    """

    def __init__(self, shape: tuple[int, int], draws: int, device: torch.device, moments: bool = False) -> None:
        self.count = 0
        self.total = torch.zeros(shape, device=device)
        self.signed = torch.zeros(draws, *shape, device=device)
        self.sign_sums = torch.zeros(draws, device=device)
        self.moments = tuple(torch.zeros(d, d, device=device) for d in shape) if moments else None
        self.squares = torch.zeros(shape[0], dtype=torch.float64, device=device)

    def add(self, x: Float[Tensor, "b n d_in"], g: Float[Tensor, "b n d_out"], signs: Float[Tensor, "draws b"]) -> None:
        """Take in a batch: inputs and gradients at the outputs, P_m = Σ_j g_j x_jᵀ over the tokens j of image m."""
        for moment, tokens in zip(self.moments or (), (g.flatten(0, 1), x.flatten(0, 1)), strict=False):
            moment.addmm_(tokens.T, tokens)
        step = max(1, ELEMENTS // self.total.numel())
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            each = g[rows].mT @ x[rows]  # (b, d_out, d_in)
            self.total += each.sum(0)
            self.squares += torch.linalg.vector_norm(each, dim=(0, 2)).double().square()
            self.signed.flatten(1).addmm_(signs[:, rows], each.flatten(1))
        self.sign_sums += signs.sum(1)
        self.count += len(x)

    def add_others(self, count: int) -> None:
        """Take in what the other processes have seen; all have seen `count` images together. All together."""
        add_up(self.total, self.signed, self.sign_sums, self.squares, *(self.moments or ()))
        self.count = count

    def mean(self, rows: slice = slice(None)) -> Float[Tensor, "d_out d_in"]:
        return self.total[rows] / self.count

    def spectrum(self, rows: slice = slice(None), keep: int = 32) -> Decomposition:
        """Singular values of G, and as null the upper bound of the first of (1/n) Σ ε_m (P_m − G).

        Random signs keep how the tokens of an image hang together and destroy what the images share. G is taken away
        first, so that a strong signal does not raise its own null.

        Args:
            rows: outputs of the layer, a part of them for q, k or v of a fused matrix.
        """
        return _against(self.mean(rows).double().cpu(), self._noise(rows), keep)

    def whitened(self, rows: slice = slice(None), keep: int = 32) -> Decomposition:
        """Singular values of Σ_δ^{-1/2} G Σ_x^{-1/2}, Σ_δ = (1/n) Σ δδᵀ and Σ_x = (1/n) Σ xxᵀ, against the null of
        random signs whitened alike.

        They are the correlations, from 0 to 1, between directions of the inputs and of the gradients at the outputs,
        and do not change when either is multiplied by an invertible matrix: a layer with large inputs or steep outputs
        counts no more than another. A step against G in these coordinates is that of K-FAC, −Σ_δ^{-1} G Σ_x^{-1}
        (Martens and Grosse 2015), whose directions are the a and b.

        Raises:
            ValueError: if the second moments were not collected.
        """
        if self.moments is None:
            raise ValueError("the second moments were not collected: pass moments=True")
        outputs, inputs = self.moments
        left, right = _inverse_root(outputs[rows, rows] / self.count), _inverse_root(inputs / self.count)
        found = _against(left @ self.mean(rows).double().cpu() @ right, left @ self._noise(rows).double() @ right, keep)
        return found._replace(a=found.a @ right, b=None if found.b is None else left @ found.b)

    def _noise(self, rows: slice) -> Float[Tensor, "draws d_out d_in"]:
        return (self.signed[:, rows] - self.sign_sums[:, None, None] * self.mean(rows)).cpu() / self.count

    def importance(self, weight: Float[Tensor, "d_out d_in"], rows: slice = slice(None)) -> float:
        """mean |W ⊙ G| (GoRA, arXiv 2502.12171)."""
        return float((weight[rows].to(self.total) * self.mean(rows)).abs().mean())

    def fisher(self, rows: slice = slice(None)) -> float:
        """Mean diagonal of the empirical Fisher information, E_m P_m², over the weight's entries."""
        squares = self.squares[rows]
        return float(squares.sum() / (self.count * len(squares) * self.total.shape[1]))


def _against(
    gradient: Float[Tensor, "d_out d_in"], noise: Float[Tensor, "draws d_out d_in"], keep: int
) -> Decomposition:
    """The spectrum of a gradient, its null from draws of noise, and the step against it."""
    null = upper_bound(leading(noise, 1)[1][:, 0].numpy())
    u, s, vh = leading(gradient, keep)
    k = min(keep, len(s))
    root = s[:k].sqrt()
    return Decomposition(s[:k], null, float(gradient.square().sum()), root[:, None] * vh[:k], -u[:, :k] * root)


def _inverse_root(moment: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """(Σ + λI)^{-1/2}, λ a share of the mean eigenvalue; 0 where nothing arrives."""
    values, vectors = torch.linalg.eigh(moment.double().cpu())
    values = values.clamp_min(0)
    if not values[-1] > 0:
        return torch.zeros_like(vectors)
    return (vectors * (values + DAMPING * values.mean()).rsqrt()) @ vectors.T


def collect_gradients(
    embed: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    modules: Mapping[str, Matrix],
    batches: Iterable[Sequence[Any]],
    samples: int,
    *,
    draws: int = 8,
    moments: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    shared: Shared | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> dict[str, Gradients]:
    """Pass up to `samples` labelled images forward and backward; every weight may be frozen.

    Args:
        embed: images -> tokens. head: tokens -> predictions, through the modules. loss: (prediction, y) -> the batch's
            mean loss. modules: the layers to watch. draws: sign draws of the null; memory is `draws` + 1 copies of the
            watched weights. moments: collect what `Gradients.whitened` needs, two more matrices a weight. shared: how
            processes share the batches, each of which returns the sums over all; None for one alone.

    Raises:
        ValueError: if there are no images, a module takes no part, or a gradient is not finite.
    """
    device = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: weight_of(module).shape for name, module in modules.items()}
    sums = {name: Gradients((shape[0], shape[1]), draws, device, moments) for name, shape in shapes.items()}
    count = 0

    def seen(name: str, x: Tensor, output: Tensor) -> None:
        x = inputs_of(modules[name], x.detach())

        def add(g: Tensor) -> None:  # windows of an image follow each other: (b nW, ...) -> (b, ...)
            images, g = signs.shape[1], outputs_of(modules[name], g)
            sums[name].add(
                x.reshape(images, -1, x.shape[-1]).float(), g.reshape(images, -1, g.shape[-1]).float(), signs
            )

        output.register_hook(add)

    with watch(modules, seen) as names, torch.enable_grad():
        for part in portions(batches, samples, shared):
            drawn = torch.randint(0, 2, (draws, part.images), generator=generator) * 2.0 - 1
            if part.own:
                signs = drawn[:, part.own.start - count :: part.own.step].to(device)
                tokens = embed(part.x.to(device)).detach().requires_grad_()
                total = loss(head(tokens), part.y.to(device)) * len(part.own)
                torch.autograd.backward(total, inputs=[tokens])
            count += part.images
            advance(part.images)
    if not count:
        raise ValueError("there are no images to measure: the data loader is empty")
    check_seen(modules, names)
    for name, found in sums.items():
        if shared is not None:
            found.add_others(count)
        if not torch.isfinite(found.total).all():
            raise ValueError(f"the gradient of {name} is not finite: check the labels and the predictor")
    return sums
