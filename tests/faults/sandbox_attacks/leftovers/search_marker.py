"""Searches its memory for another program's marker, by a pattern that matches neither itself nor its source."""

import re

pattern = re.compile(b"# zyx[w]vu-marker")
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb") as memory:
    for line in maps:
        span, mode = line.split()[:2]
        if "rw" in mode and "[v" not in line:
            start, end = (int(part, 16) for part in span.split("-"))
            memory.seek(start)
            try:
                if pattern.search(memory.read(end - start)):
                    print("found in", line)
            except OSError:
                pass
print("held")
