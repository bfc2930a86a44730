"""What a stage shows beside its learning curve, as plain values, and the loggers that show it."""
