error = ValueError("x")
error.add_note("first note\nof two lines")
raise error
