# differential: {"stdin": "3 4\n5\n"}
puts STDIN.read.split.sum(&:to_i)
