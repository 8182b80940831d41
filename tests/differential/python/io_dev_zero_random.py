print(open("/dev/zero", "rb").read(4), len(open("/dev/urandom", "rb").read(9)), len(open("/dev/random", "rb").read(5)))
