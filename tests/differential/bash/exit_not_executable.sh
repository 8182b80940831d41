touch x; ./x
