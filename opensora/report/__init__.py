"""One offline page from what runs left on disk: gathered, drawn and written without a browser."""
