import main
print(__name__)
