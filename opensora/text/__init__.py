"""Text encoders behind one `encode(prompts) -> Condition`."""
