"""Datasets: LightningDataModules with a `.task`; train, val and test never overlap."""
