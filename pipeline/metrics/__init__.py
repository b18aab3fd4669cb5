"""One answer beside its reference becomes a number. Open `registry` first."""
