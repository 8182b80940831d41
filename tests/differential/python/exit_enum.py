import enum
class Code(enum.IntEnum):
    BAD = 4
raise SystemExit(Code.BAD)
