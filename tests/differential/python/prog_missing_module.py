try:
    import surely_no_numpy
except ImportError as error:
    print(error.name, error)
