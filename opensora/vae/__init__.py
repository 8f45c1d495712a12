"""Video autoencoders: pixels to normalised latents and back."""
