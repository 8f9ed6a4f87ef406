"""Trainable adapters behind one small interface."""
