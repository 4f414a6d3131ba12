"""One architecture per file; shared parts are in `layers/`."""
