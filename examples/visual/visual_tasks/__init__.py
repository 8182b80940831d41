"""The four domains of the visual recipe and the sets drawn from them."""
