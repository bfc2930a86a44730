"""An option that is not there: what to write instead, beside what Hydra says."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hydra.errors import HydraException

from orca_rank.__main__ import CONF
from orca_rank.hints import hint


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("rank=uniform", "rank.gamma=2"), "rank.gamma is an option of .*rank=proportional.*: give one of them too"),
        (("adapter.module.concentration=2",), "adapter=dylora.*adapter=matryoshka"),  # inherited ones among them
        (("finetune.epoch=3",), "there is no option finetune.epoch; did you mean finetune.epochs"),
        (("finetune.lr=3",), "did you mean finetune.optimizer.lr"),
        (("adapter.modul.alpha=3",), "did you mean adapter.module.alpha"),
        (("rnk=uniform",), r"did you mean rank\?"),
        (("rank=unifrm",), r"did you mean rank=uniform\?"),
        (("trainer.max_steps=3",), r"an option of lightning.Trainer .* is given as \+trainer.max_steps=…"),
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_told_its_right_name(composed: Callable, options: tuple[str, ...], said: str) -> None:
    with pytest.raises(HydraException) as caught:
        composed(*options)
    found = hint(caught.value, CONF)
    assert found is not None and re.search(said, found), found


def test_other_errors_and_names_like_no_other_get_no_hint(composed: Callable) -> None:
    assert hint(ValueError("something else"), CONF) is None
    with pytest.raises(HydraException) as caught:
        composed("qqqq=1")
    assert hint(caught.value, CONF) is None
