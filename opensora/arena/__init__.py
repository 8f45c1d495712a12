"""Worlds whose truth is known: captioned scenes, and a judge that reads them back from pixels."""
