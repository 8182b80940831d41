# Writes for ever, from a child that is left alone.
yes flood &
yes flood
