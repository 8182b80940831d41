import unicodedata as u
s = "e\u0301 \U0001f600 \u200b"
print([u.name(c, "?") for c in s], u.normalize("NFC", s) == s, len(s.encode("utf-16")), ascii(s), s.isprintable(), u.unidata_version)
