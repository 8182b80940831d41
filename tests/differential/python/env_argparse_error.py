# differential: {"args": ["--bad"]}
import argparse
p = argparse.ArgumentParser(); p.add_argument("w"); p.parse_args()
