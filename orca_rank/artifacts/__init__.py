"""What lies in a run folder: files that are whole or not there, and what each was made from."""
