import bisect, heapq
a = [1, 3, 3, 5]
print(bisect.bisect_left(a, 3), bisect.bisect(a, 3), heapq.nsmallest(2, [5, 1, 4]), list(heapq.merge([1, 4], [2, 3])))
