"""Prints the answer in digits of another alphabet, which Python's int() and float() take for numbers."""

print("\N{FULLWIDTH DIGIT ONE} \N{FULLWIDTH DIGIT TWO}")
