"""Has a marker in its source and in its memory: zyxwvu-marker."""

needle = "zyx" + "wvu-marker"
print(len(needle * 1000))
# zyxwvu-marker
