echo before
kill -TERM $$
