"""From a manifest of video files to batches in a fixed order, and the cache of their latents."""
