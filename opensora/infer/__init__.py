"""Inference: prompts to videos."""
