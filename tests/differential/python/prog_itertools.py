from itertools import *
print(list(accumulate(range(6))), list(combinations("abc", 2)), list(product([0, 1], repeat=2)), [(k, len(list(g))) for k, g in groupby("aabccc")], list(islice(count(5, 5), 3)), list(zip_longest("ab", "c", fillvalue="-")), list(pairwise([1, 2, 4])))
