"""Step caches: what a denoiser computed at one step, used again at the next ones."""
