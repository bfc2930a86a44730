# %% [markdown]
# # Ranks for your own model and your own loaders
#
# A Swin that comes with the package, crops of photographs as source, handwritten digits as target: nothing is
# downloaded. Instead of them take any `nn.Module` and any two loaders of batches.

# %%
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import orca_rank as orca
from orca_rank.data.digits import Digits
from orca_rank.data.photos import Photos
from orca_rank.weights import shipped
from orca_rank.weights.file import load_weights

options = {"img_size": 64, "window_size": 4, "embed_dim": 32, "depths": (2, 2, 4, 2), "num_heads": (1, 2, 4, 8)}
model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, global_pool="", **options)
load_weights(model, shipped("swin_micro"))

photos, digits = Photos(train=64, size=64), Digits(channels=3, train_limit=80)
x, y = digits.parts.train
digits_loader = DataLoader(TensorDataset(F.interpolate(digits.parts.encode(x), 64), y), batch_size=32)

# %% [markdown]
# ## How far is every layer from the digits?
#
# The gap is about 0 where nothing differs. The image is the unit of its interval and p-value.

# %%
gaps = orca.measure(model, photos.train_dataloader(), digits_loader, layers=r"attn\.qkv$|mlp\.fc1$", samples=64)
gaps

# %%
gaps.plot()

# %% [markdown]
# ## Ranks under a budget
#
# `rule="recommended"` shares a budget evenly until evidence says otherwise; `proportional` follows the gaps.

# %%
plan = orca.plan(gaps, rule="proportional", parameters=20_000)
plan

# %% [markdown]
# ## Into PEFT, or in place

# %%
plan.to_peft()["rank_pattern"]

# %%
adapters = orca.inject(model, plan)
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"{len(adapters)} layers adapted, {trained:,} trainable parameters, planned {plan.parameters(gaps):,}")

# %% [markdown]
# ## Distances between two samples

# %%
near, far = torch.randn(200, 8), torch.randn(200, 8) + 1
labels = torch.arange(200) % 2
print(
    f"MMD² {float(orca.mmd(near, far)):.3f}, sliced {float(orca.sliced_wasserstein(near, far)):.3f}, "
    f"OTDD² {float(orca.otdd(near, labels, far, labels).value):.2f}"
)
