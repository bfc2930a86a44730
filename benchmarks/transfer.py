"""How well frozen features of a pretrained backbone transfer to CIFAR-100, beside the same network with random weights.

    python benchmarks/transfer.py --data data                              # the shipped swin_micro
    python benchmarks/transfer.py --data data --weights runs/x/pretrain/weights.safetensors

Protocol: CIFAR-100 bicubic to 64×64, 20,000 training and 10,000 test images; features are the token mean of the last
layer, standardised by the training images. Linear probe: softmax regression with L2 penalty, fitted to convergence.
kNN: majority of the 20 nearest in Euclidean distance. About three minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from orca_rank.backbone import create_timm
from orca_rank.data.cifar import read_official
from orca_rank.data.module import stratified_order
from orca_rank.weights import record, shipped

PENALTY = 1e-3


@torch.inference_mode()
def features(body: torch.nn.Module, images: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """Token means of the last layer, (n, 3, 32, 32) uint8 -> (n, d)."""
    parts = []
    for part in images.split(250):
        x = F.interpolate(part.float() / 255, (size, size), mode="bicubic").clamp(0, 1)
        parts.append(body((x - mean) / std).flatten(1, -2).mean(1))
    return torch.cat(parts)


def linear_probe(train: Tensor, y: Tensor, test: Tensor, labels: Tensor) -> float:
    """Test accuracy of softmax regression: mean cross-entropy + PENALTY/2 ‖W‖², minimised by L-BFGS."""
    weight = torch.zeros(train.shape[1], int(y.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=150, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight + bias, y) + PENALTY / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return ((test @ weight + bias).argmax(1) == labels).float().mean().item()


def nearest_neighbours(train: Tensor, y: Tensor, test: Tensor, labels: Tensor, k: int = 20) -> float:
    """Test accuracy of the majority among the k nearest; ties go to the smaller class."""
    right = 0
    for part, label in zip(test.split(500), labels.split(500), strict=True):
        near = torch.cdist(part, train).topk(k, largest=False).indices
        right += int((F.one_hot(y[near], int(y.max()) + 1).sum(1).argmax(1) == label).sum())
    return right / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds cifar-100-python/")
    parser.add_argument("--weights", type=Path, help="safetensors of the backbone below (default: the shipped file)")
    parser.add_argument("--backbone", type=Path, help="a yaml of conf/backbone (default: as shipped)")
    parser.add_argument("--train", type=int, default=20_000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    backbone = OmegaConf.to_container(OmegaConf.load(options.backbone)) if options.backbone else record("swin_micro")
    weights = options.weights or shipped("swin_micro")
    images, labels = read_official(options.data / "cifar-100-python", "train")
    chosen = stratified_order(labels, 0)[: options.train]
    test_images, test_labels = read_official(options.data / "cifar-100-python", "test")
    x, y = torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen])
    test_x, test_y = torch.from_numpy(test_images[: options.test]), torch.from_numpy(test_labels[: options.test])
    mean = torch.from_numpy(images[chosen].mean((0, 2, 3), dtype=np.float64)).float()[:, None, None] / 255
    std = torch.from_numpy(images[chosen].std((0, 2, 3), dtype=np.float64)).float()[:, None, None] / 255

    result: dict[str, dict[str, float]] = {}
    for name, source in (("pretrained", str(weights)), ("random", False)):
        torch.manual_seed(0)
        body = create_timm({**backbone, "pretrained": source}).eval()
        size = body.patch_embed.img_size[0]
        train_f, test_f = (features(body, part, size, mean, std) for part in (x, test_x))
        centre, scale = train_f.mean(0), train_f.std(0).clamp_min(1e-6)
        train_f, test_f = (train_f - centre) / scale, (test_f - centre) / scale
        result[name] = {
            "linear": linear_probe(train_f, y, test_f, test_y),
            "knn20": nearest_neighbours(train_f, y, test_f, test_y),
        }
        print(name, {key: f"{value:.2%}" for key, value in result[name].items()}, flush=True)
    result["ratio"] = {key: result["pretrained"][key] / result["random"][key] for key in result["random"]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
