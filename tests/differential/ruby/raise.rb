def f = raise(ArgumentError, "bad")
puts "before"
f
