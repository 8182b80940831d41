value = max(
    1,
    int("x"),
)
