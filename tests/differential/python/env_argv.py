# differential: {"args": ["one", "", "two words", "\u00fc", "-x", "--", "*"]}
import sys
print(sys.argv)
