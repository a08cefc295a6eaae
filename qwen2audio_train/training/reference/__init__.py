"""The reference of preference optimisation: live, an adapter switched off, or log-probabilities stored on disk."""
