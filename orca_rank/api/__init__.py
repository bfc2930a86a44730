"""What `import orca_rank` offers to a script or a notebook: any model and any batches, no config and no run folder."""
