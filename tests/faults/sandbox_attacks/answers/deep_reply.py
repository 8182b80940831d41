"""Makes replies that are too deep, no JSON, or no UTF-8 for whoever reads them."""

import json


def encode(value, **names):
    return "[" * 50_000 + "]" * 50_000 if value == 3 else "\udcff{]"


json.dumps = encode


def f(x):
    return x
