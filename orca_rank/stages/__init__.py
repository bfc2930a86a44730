"""The stages: each reads files of the run folder, does one job and writes files of the run folder."""
