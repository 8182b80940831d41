import locale, sys
print(sys.stdin.encoding, sys.stdout.encoding, sys.stderr.encoding, sys.stdin.errors, sys.stdout.errors, sys.stderr.errors, sys.getfilesystemencoding(), sys.getfilesystemencodeerrors(), locale.getpreferredencoding(), locale.getlocale(), locale.setlocale(locale.LC_ALL))
