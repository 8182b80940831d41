# differential: {"args": ["-h"]}
import argparse
argparse.ArgumentParser(description="Adds.").parse_args()
