"""Is a type where a function is expected."""

f = type
