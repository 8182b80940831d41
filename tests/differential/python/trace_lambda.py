f = lambda x: (lambda y: x[y])(0)
f([])
