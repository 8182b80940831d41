"""Small programs of every language whose runs in the sandbox are compared with those under the plain interpreter.

A program is one file, LANGUAGE/NAME.EXTENSION, with the extension source where no tool for Python can read it. One of
its first three lines may hold, after `differential:`, a JSON object with what it is started with: `stdin` (or
`stdin_hex`, or `stdin_repeat`: a text and how often), `args`, `env`.

    python -m tests.differential            runs all of them both ways and prints what differs
    python -m tests.differential python/io  runs those whose names begin so
    python -m tests.differential --record   records how the plain interpreter ran the Python ones, for `make test`
"""
