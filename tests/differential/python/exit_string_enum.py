import enum
class Code(str, enum.Enum):
    BAD = "bad"
raise SystemExit(Code.BAD)
