"""Preference pairs: answers sampled from a checkpoint and scored, or made by rule, written with their provenance."""
