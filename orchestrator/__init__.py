"""The deciding: backbone, head, roles, workflows. Pure Python and torch; imports no Ray."""
