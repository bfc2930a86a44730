"""`python -m orca_rank`: Hydra composes the config, one stage runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from threadpoolctl import threadpool_limits

from orca_rank.build import build

_CHECKOUT = Path(__file__).parents[1] / "conf"
CONF = _CHECKOUT if (_CHECKOUT / "config.yaml").is_file() else Path(__file__).parent / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(config: DictConfig) -> None:
    """Run the configured stage; an error is one message on stderr and exit status 1."""
    try:
        if config.threads is not None:
            threadpool_limits(int(config.threads))
            torch.set_num_threads(int(config.threads))
        build(config.stage)(config)
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from the last checkpoint")
    except Exception as error:
        if os.environ.get("ORCA_RANK_TRACEBACK"):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        sys.exit(f"error: {message}\n(ORCA_RANK_TRACEBACK=1 shows where)")


if __name__ == "__main__":
    main()
