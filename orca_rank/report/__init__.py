"""A run folder as one page of tables and figures."""
