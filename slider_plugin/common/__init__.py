"""Conventions that several model families share; for the modules of families, ours and everybody's."""
