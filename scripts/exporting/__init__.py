"""The parts of scripts/export.py."""
