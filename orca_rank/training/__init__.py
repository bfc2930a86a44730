"""The LightningModules of the stages and what they train with."""

import logging
import warnings

import lightning.pytorch  # noqa: F401 (its own import sets the level that the next line corrects)

# Lightning's banners and hints say nothing that a user of these stages can act on.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
for _message in (
    "(Checkpoint|Experiment logs) directory .* exists and is not empty",
    ".*does not have many workers",
    ".*isinstance.treespec, LeafSpec.",
    "The number of training batches",
    "It is recommended to use `self.log.*sync_dist=True",  # the modules add up over processes, exactly
    "Grad strides do not match bucket view strides",  # of 1×1 convolutions: other strides, the same memory
):
    warnings.filterwarnings("ignore", message=_message)
