def größe(ß): return ß["✓"]
größe({})
