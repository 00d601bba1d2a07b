"""The embedded default: generated games and products, lessons, and the tiny policies they made."""
