import getpass
try:
    getpass.getpass()
except EOFError as error:
    print("EOF")
