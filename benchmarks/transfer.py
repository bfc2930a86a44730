"""How well a pretrained backbone transfers to CIFAR-100, beside the same network with random weights.

    python benchmarks/transfer.py --data data                              # the shipped swin_micro: frozen features
    python benchmarks/transfer.py --data data --finetune 2                 # and full fine-tuning for 2 epochs
    python benchmarks/transfer.py --data data --source                     # only its accuracy on Tiny-ImageNet
    python benchmarks/transfer.py --data data --weights runs/x/pretrain/weights.safetensors

Protocol: CIFAR-100 bicubic to 64×64, 20,000 training and 10,000 test images; features are the token mean of the last
layer, standardised by the training images. Linear probe: softmax regression with L2 penalty, fitted to convergence.
kNN: majority of the 20 nearest in Euclidean distance. About three minutes on one core. Fine-tuning: AdamW 1e-3 on the
first 10,000 of these images (a tenth held out), the same options for both networks, tested after the last epoch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors import safe_open
from torch import Tensor

from orca_rank.backbone import create_timm
from orca_rank.data.cifar import read_official
from orca_rank.data.splits import stratified_order
from orca_rank.training.pretrain import pretrain
from orca_rank.training.recipe import Recipe
from orca_rank.weights import record, shipped
from orca_rank.weights.file import load_weights

PENALTY = 1e-3
Pair = tuple[Tensor, Tensor]


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


def enlarged(images: Tensor, size: int) -> Tensor:
    """Bicubic to size × size, uint8."""
    parts = [F.interpolate(part.float(), (size, size), mode="bicubic") for part in images.split(1000)]
    return torch.cat([part.round().clamp(0, 255).byte() for part in parts])


def finetune(backbone: dict, weights: Path | None, train: Pair, test: Pair, epochs: int) -> float:
    """Test accuracy after full fine-tuning, from weights or from scratch."""
    torch.manual_seed(0)
    network = timm.create_model(backbone["name"], num_classes=100, **backbone["options"])
    size = network.patch_embed.img_size[0]
    if weights is not None:
        head = {name: value.clone() for name, value in network.head.state_dict().items()}
        body = create_timm({**backbone, "pretrained": str(weights)})
        network.load_state_dict({**body.state_dict(), **{f"head.{name}": value for name, value in head.items()}})
    x, y = enlarged(train[0], size), train[1]
    held = len(x) // 10
    recipe = Recipe(epochs=epochs, batch_size=64, lr=1e-3, warmup_epochs=0.2, ema=0.9, half=False)
    with tempfile.TemporaryDirectory() as folder:
        path = pretrain(network, (x[held:], y[held:]), (x[:held], y[:held]), Path(folder), recipe, 100)
        return top1(backbone, path, (enlarged(test[0], size), test[1]), 100)


@torch.inference_mode()
def top1(backbone: dict, weights: Path, data: Pair, classes: int) -> float:
    """Accuracy of a classifier that stage=pretrain wrote, on (uint8 images, labels)."""
    network = timm.create_model(backbone["name"], num_classes=classes, **backbone["options"]).eval()
    load_weights(network, weights)
    with safe_open(weights, framework="pt") as stream:
        mean, std = (torch.tensor(json.loads(stream.metadata()[name]))[:, None, None] for name in ("mean", "std"))
    right = 0
    for x, y in zip(data[0].split(250), data[1].split(250), strict=True):
        right += int((network((x.float() / 255 - mean) / std).argmax(1) == y).sum())
    return right / len(data[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds cifar-100-python/")
    parser.add_argument("--weights", type=Path, help="safetensors of the backbone below (default: the shipped file)")
    parser.add_argument("--backbone", type=Path, help="a yaml of conf/backbone (default: as shipped)")
    parser.add_argument("--train", type=int, default=20_000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--finetune", type=int, default=0, help="epochs of full fine-tuning (default: none)")
    parser.add_argument("--source", action="store_true", help="only measure top-1 on <data>/tiny_imagenet.npz")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    backbone = OmegaConf.to_container(OmegaConf.load(options.backbone)) if options.backbone else record("swin_micro")
    weights = options.weights or shipped("swin_micro")
    if options.source:
        with np.load(options.data / "tiny_imagenet.npz") as file:
            x, y = torch.from_numpy(file["x_val"]).permute(0, 3, 1, 2), torch.from_numpy(file["y_val"]).long()
        print(f"Tiny-ImageNet validation top-1 {top1(backbone, weights, (x, y), 200):.2%} of {len(x)} images")
        return
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
        if options.finetune:
            start = None if source is False else weights
            data = (x[:10_000], y[:10_000]), (test_x, test_y)
            result[name]["finetune"] = finetune(backbone, start, *data, options.finetune)
        print(name, {key: f"{value:.2%}" for key, value in result[name].items()}, flush=True)
    result["ratio"] = {key: result["pretrained"][key] / result["random"][key] for key in result["random"]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
