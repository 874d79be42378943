"""Measured ratios. Each script prints a table and, as its last line, one JSON object; `--quick` ends in a minute."""
