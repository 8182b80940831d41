print(1, 1.0, 2^53, 10 // 3, -7 % 3, 1e100, 0/0, "é", #"é", nil, true, 7 & 3, "10" + 5, math.maxinteger + 1)
