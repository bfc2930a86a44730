"""Measure the modality gap of every layer of a pretrained vision transformer and adapt it with LoRA ranks to match."""
