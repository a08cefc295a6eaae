"""Checkpoint folders: whole or absent, verified before anything is loaded from them."""
