print(len(open(__file__).read().splitlines()), __import__("inspect").getsource(__import__("__main__"))[:20])
