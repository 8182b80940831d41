import re
text = "John: 25, Ann: 31; bob:7"
print(re.findall(r"(\w+):\s*(\d+)", text), re.sub(r"\d+", lambda m: str(int(m[0]) + 1), text), re.split(r"[,;]\s*", text), re.match(r"(?P<n>\w+)", text).groupdict(), re.compile("a.c", re.S | re.I))
