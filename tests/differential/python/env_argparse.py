# differential: {"args": ["--n", "3", "word"]}
import argparse
p = argparse.ArgumentParser(); p.add_argument("--n", type=int); p.add_argument("w")
print(p.parse_args())
