"""Scikit-learn's 8×8 handwritten digits: bundled, so they need no download."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from orca_rank.data.module import InMemory, Parts, check_fraction, check_whole
from orca_rank.data.splits import limited, stratified_order, take_test, take_validation
from orca_rank.task import Task


class Digits(InMemory):
    """1,797 digits of 10 classes, as source (3 equal channels) or target (1 channel).

    Args:
        channels: 1, or 3 equal copies.
        invert: dark on bright instead of bright on dark.
        mirror: flipped left to right. `invert` and `mirror` make a near target of the same source.
        test_fraction, val_fraction: held out of all, and then of the rest, class by class.
        train_limit: samples for train and val together; null for all. test_limit: of the test set.
        split_seed: of the split; two modules with the same one never share samples between train and test.
        batch_size, seed: see `InMemory`.

    Raises:
        ValueError: for another number of channels, or fractions and limits that leave nothing to train on.
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        invert: bool = False,
        mirror: bool = False,
        test_fraction: float = 0.2,
        val_fraction: float = 0.1,
        train_limit: int | None = None,
        test_limit: int | None = None,
        split_seed: int = 0,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        check_fraction("test_fraction", test_fraction)
        check_fraction("val_fraction", val_fraction)
        check_whole("train_limit", train_limit, optional=True)
        check_whole("test_limit", test_limit, optional=True)
        check_whole("split_seed", split_seed, least=0)
        if channels not in (1, 3):
            raise ValueError(f"digits come with 1 or 3 channels, received channels={channels}")
        self.channels, self.invert, self.mirror = channels, invert, mirror
        self.test_fraction, self.val_fraction, self.split_seed = test_fraction, val_fraction, split_seed
        self.train_limit, self.test_limit = train_limit, test_limit

    def load(self) -> Parts:
        digits = load_digits()
        labels = digits.target.astype(np.int64)
        x = torch.from_numpy(digits.images / 16).float()[:, None].expand(-1, self.channels, -1, -1)  # (1797, C, 8, 8)
        if self.invert:
            x = 1 - x
        if self.mirror:
            x = x.flip(-1)
        y = torch.from_numpy(labels)
        test, rest = take_test(stratified_order(labels, self.split_seed), self.test_fraction)
        train, val = take_validation(rest, self.val_fraction, self.train_limit)
        test = limited(test, self.test_limit, "test_limit")
        inputs = self.inputs(x[train], "channel")
        return Parts(
            task=Task("classification", (self.channels, 8, 8), (10,)),
            train=(x[train], y[train]),
            val=(x[val], y[val]),
            test=(x[test], y[test]),
            encode=inputs.encode,
            inputs=inputs,
        )
