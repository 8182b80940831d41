"""Test cases for problems without any: a generator's inputs, and the outputs that known solutions agree on."""
