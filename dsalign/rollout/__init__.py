"""Sampling of completions from the policy that is being trained."""
