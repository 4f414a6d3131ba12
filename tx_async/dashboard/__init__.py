"""The page at `/`: see README.md."""
