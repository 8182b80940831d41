local c = coroutine.wrap(function(a) for i = 1, 2 do a = coroutine.yield(a * i) end return "end" end)
print(c(2), c(3), c(4)); print(pcall(c))
