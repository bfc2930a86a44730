"""The LightningModules of the stages and what they train with."""
