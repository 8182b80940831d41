"""One file per kind of thing that is compared: numbers, outputs, JSON values."""
