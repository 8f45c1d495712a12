"""VBench: prompts, drawing, dimensions, totals and files that its own scripts accept."""
