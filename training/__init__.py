"""Tasks, labels, supervised training, evolution and evaluation of the router."""
